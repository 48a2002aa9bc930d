"""The output of a conversion: a folder, or a prefix of an object store; and what may already be there.

Until all is whole, `plan.json` is beside the shards, and a `part.PPPPP.json` for each part whose shards are all there.
Only then are `spec.json` and, last, `index.json` written. A folder is made as FOLDER.partial, and renamed. An earlier
conversion stays until the new one is whole, and files that no conversion wrote are never deleted.
"""

import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from convert.engine.plan import LATE, PLAN_NAME, Plan, changed_file, changes
from sit_composer.cli import is_remote, s3_endpoint
from sit_composer.clouds import EXPECTED
from sit_composer.data.spec import INDEX_NAME, SPEC_NAME, DataSpec
from sit_composer.errors import UserError
from sit_composer.storage import LocalFolder, RunFolder, StorageError, open_store

AGAIN = "again-"  # prefix of the shards that replace earlier ones in an object store; then none, in turns
PART = re.compile(r"part\.\d{5,}\.json")
SHARD = re.compile(rf"({AGAIN})?shard\.\d{{5,}}(\.\d{{5,}})?\.mds")
JSON = r"(index|plan|spec|part\.\d{5,})\.json"
OURS = re.compile(rf"{SHARD.pattern}|{JSON}|\.{JSON}\.\d+")  # the last was being written at a kill
SCRATCH = "scratch"  # a folder of shards that are being written


class OutputError(UserError):
    """Why the output cannot be written there, and what to do."""


class Output(AbstractContextManager["Output"]):
    """The place that ``--out`` names. One process holds it, from `begin` on; others may `put` into it meanwhile."""

    def __init__(self, out: str) -> None:
        self.uri = out
        self.prefix = ""  # of shards' names
        self.lock: int | None = None
        self.begun = False  # its content is this conversion's, and not yet published
        self.place: Path  # a local folder, which is locked; shards are written below it
        self.path: Path | None = None  # of a folder; None for an object store
        self.store: RunFolder  # where a conversion is written
        self.final: RunFolder  # where a whole one lies
        if out.startswith("dbfs:/"):
            raise OutputError(f"{out}: an unknown object store, {EXPECTED}; copy a folder there")
        if is_remote(out):
            self.store = self.final = open_store(out)
            name = hashlib.sha256(f"{out.rstrip('/')} {s3_endpoint()}".encode()).hexdigest()[:16]
            # Named by the output, so that the next run finds and removes what a killed run left there.
            self.place = Path(tempfile.gettempdir(), f"to_mds-{os.getuid()}-{name}")
            return
        self.path = Path(out).resolve()
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{out}: is a file; choose another --out")
        if self.path.is_mount():
            raise OutputError(f"{out}: is a mount point, which cannot be renamed; choose a folder inside it")
        self.place = self.path.with_name(self.path.name + ".partial")
        self.store, self.final = LocalFolder(str(self.place)), LocalFolder(str(self.path))

    def is_done(self, source: dict[str, Any], overwrite: bool) -> bool:
        """Whether the whole conversion of this source is there. False: the place is free, or may be replaced."""
        files = _entries(self.path) if self.path else self.store.listing()
        _refuse_foreign(self.uri, files)
        if not files or (self.path is None and PLAN_NAME in files and INDEX_NAME not in files):
            return False
        text = self.final.read(SPEC_NAME)
        if text is None:  # MDS shards of another program
            raise OutputError(f"{self.uri}: holds shards without {SPEC_NAME}, not this program's; choose another --out")
        if overwrite:
            return False
        try:
            there = DataSpec.from_json(text.decode("utf-8", "replace"), f"{self.uri}/{SPEC_NAME}").source
        except ValueError as error:
            raise OutputError(f"{error}: choose another --out") from None
        if difference := changes(there, {key: there[key] for key in LATE if key in there} | source):
            raise OutputError(f"{self.uri}: is another conversion ({difference}); --overwrite replaces it")
        shards = self._indexed()
        if shards is None or not shards.items() <= files.items():
            raise OutputError(f"{self.uri}: is damaged, shards in its {INDEX_NAME} are missing; use --overwrite")
        if PLAN_NAME in files and _read_json(self.final, PLAN_NAME).get("source") == there:  # killed after publishing
            with suppress(OutputError):  # another run holds it
                self._take()
                if self.path:
                    _remove_replaced(self.path)
                    with suppress(OSError):  # unless it is empty
                        self.place.rmdir()
                _delete(self.final, files, {*shards, INDEX_NAME, SPEC_NAME})
        return True

    def _indexed(self) -> dict[str, int] | None:
        """The names and bytes of the shards in the index that is there; None if it cannot be read."""
        try:
            return _sizes(_read_json(self.final, INDEX_NAME)["shards"])
        except (KeyError, TypeError):
            return None

    def begin(self, plan: Plan, overwrite: bool) -> dict[int, dict[str, Any]]:
        """Takes the place, for this plan alone. Returns the records of its parts that are finished, by number."""
        self._take()
        files = _entries(self.place) if self.path else self.store.listing()
        if self.path and PLAN_NAME in files:
            files.pop(SCRATCH, None)
        _refuse_foreign(self.store.uri, files)
        if self.path and files and PLAN_NAME not in files:
            raise OutputError(f"{self.store.uri}: holds shards, but no {PLAN_NAME} of a conversion; move it away")
        there = _read_json(self.store, PLAN_NAME) if PLAN_NAME in files else {}
        resumes = there.get("digest") == plan.record()["digest"]
        if PLAN_NAME in files and not resumes and not overwrite:
            difference = changes(there.get("source", {}), plan.source) or "the source's files have changed"
            difference += changed_file(there.get("files"), plan.reading.files)
            raise OutputError(f"{self.store.uri}: holds another unfinished conversion ({difference}); use --overwrite")
        self.begun = True
        shutil.rmtree(self.place / SCRATCH, ignore_errors=True)
        if not resumes:
            self._clear(files)
            earlier = self._indexed() if self.path is None else None
            self.prefix = AGAIN if any(name.startswith("shard.") for name in earlier or ()) else ""
            there = {"prefix": self.prefix, **plan.record()}
            self.store.write(PLAN_NAME, f"{json.dumps(there)}\n".encode())
            return {}
        self.prefix = there["prefix"]
        records = [_read_json(self.store, name) for name in sorted(files) if PART.fullmatch(name)]
        # A power failure may leave an empty record.
        return {one["part"]: one for one in records if one and _sizes(one["shards"]).items() <= files.items()}

    def _clear(self, files: Iterable[str]) -> None:
        """Removes the files of an earlier attempt. In an object store, a whole earlier conversion stays beside them."""
        _delete(self.store, files, set() if self.path else {INDEX_NAME, SPEC_NAME, *(self._indexed() or ())})

    def _take(self) -> None:
        try:
            self.place.mkdir(parents=True, exist_ok=True, mode=0o777 if self.path else 0o700)
        except OSError as error:
            raise OutputError(f"{self.place}: cannot be made: {error.strerror}") from error
        lock = os.open(self.place, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends in any way
        except BlockingIOError:
            os.close(lock)
            busy = "another conversion is writing to it"
            raise OutputError(f"{self.uri}: {busy}; wait, or choose another --out") from None
        self.lock = lock

    def scratch(self) -> tempfile.TemporaryDirectory[str]:
        """A new, empty local folder, from which files are `put`."""
        (self.place / SCRATCH).mkdir(parents=True, exist_ok=True, mode=0o700)
        return tempfile.TemporaryDirectory(dir=self.place / SCRATCH, ignore_cleanup_errors=True)

    def put(self, file: Path) -> None:
        """Moves a file there, under its own name. It appears whole, or not at all."""
        if isinstance(self.store, LocalFolder):
            os.replace(file, self.place / file.name)
        else:
            self.store.upload(file, file.name)
            file.unlink()

    def finish_part(self, record: dict[str, Any]) -> None:
        """Notes that a part's shards are all there."""
        self.store.write(f"part.{record['part']:05}.json", f"{json.dumps(record)}\n".encode())

    def publish(self, spec: DataSpec, records: list[dict[str, Any]]) -> None:
        """Makes the conversion visible, in place of an earlier one. Raises OutputError if a shard is not there."""
        files = self.store.listing()
        shards = [shard for record in records for shard in record["shards"]]
        sizes = _sizes(shards)
        for name in sizes:
            if files.get(name) != sizes[name]:
                lost = "has been lost since it was written"
                raise OutputError(f"{self.store.uri}/{name}: {lost}; run the same command again")
        if self.path is None:
            self.store.delete([INDEX_NAME, SPEC_NAME])  # the index first
        self.store.write(SPEC_NAME, spec.to_json().encode())
        self.store.write(INDEX_NAME, json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode())
        shutil.rmtree(self.place / SCRATCH, ignore_errors=True)
        if self.path:
            for folder in (self.place, self.path):  # files may have been added since it began
                _refuse_foreign(str(folder), _entries(folder))
            if self.path.exists():
                self.path.rename(self.path.with_name(f"{self.path.name}.replaced-{os.getpid()}"))
            self.place.rename(self.path)
            _remove_replaced(self.path)
        self.begun = False
        _delete(self.final, files, {*sizes, INDEX_NAME, SPEC_NAME})

    def __exit__(self, *_: object) -> None:
        """Releases the place. Finished parts stay, for the next run; without any, nothing stays."""
        if self.lock is None:
            return
        if self.begun:
            shutil.rmtree(self.place / SCRATCH, ignore_errors=True)
            with suppress(StorageError):  # the store may be why the conversion failed; then the next run clears up
                files = self.store.listing()
                if not (any(map(PART.fullmatch, files)) and any(map(SHARD.fullmatch, files))):
                    self._clear(files)
        if self.path is None:
            shutil.rmtree(self.place, ignore_errors=True)
        elif self.begun or not self.path.exists():
            with suppress(OSError):  # unless it is empty
                self.place.rmdir()
        os.close(self.lock)
        self.lock = None


def _refuse_foreign(uri: str, files: Iterable[str]) -> None:
    if foreign := sorted(name for name in files if not OURS.fullmatch(name)):
        these = ", ".join(foreign[:3])
        raise OutputError(f"{uri}: holds files that this program did not write ({these}); choose another --out")


def _delete(store: RunFolder, names: Iterable[str], keep: set[str]) -> None:
    """Deletes a conversion's files except some; the plan last, as it tells whose they are."""
    store.delete(sorted(set(filter(OURS.fullmatch, names)) - keep, key=lambda name: (name == PLAN_NAME, name)))


def _entries(folder: Path) -> dict[str, int]:
    """The names and bytes of a folder's files and folders."""
    return {entry.name: entry.lstat().st_size for entry in folder.iterdir()} if folder.is_dir() else {}


def _read_json(store: RunFolder, name: str) -> dict[str, Any]:
    """The object in a file; empty if there is none that can be read."""
    with suppress(ValueError):
        if isinstance(content := json.loads(store.read(name) or "{}"), dict):
            return content
    return {}


def _sizes(shards: list[dict[str, Any]]) -> dict[str, int]:
    """The bytes of the shards in an index, by name."""
    return {shard["raw_data"]["basename"]: shard["raw_data"]["bytes"] for shard in shards}


def _remove_replaced(path: Path) -> None:
    """Removes the conversions that the one there has replaced, also those of runs that were killed here."""
    for folder in path.parent.glob(f"{glob.escape(path.name)}.replaced-*"):
        names = _entries(folder)
        if SPEC_NAME in names and all(map(OURS.fullmatch, names)):
            shutil.rmtree(folder, ignore_errors=True)
