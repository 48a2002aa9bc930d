"""Where a conversion goes: a folder, or a prefix of an object store; and what may already be there.

Beside the shards lie, until all is whole, `plan.json` and a `part.PPPPP.json` for each part whose shards are all there.
Only then come `spec.json` and, last, `index.json`. A folder is made as FOLDER.partial, and renamed. An earlier
conversion stays until the new one is whole, and what no conversion wrote is never deleted.
"""

import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from convert.engine.plan import LATE, PLAN_NAME, Plan, changed_file, changes
from sit_composer.data.spec import INDEX_NAME, SPEC_NAME, DataSpec
from sit_composer.storage import LocalFolder, S3Folder, StorageError

AGAIN = "again-"  # prefix of the shards that replace earlier ones in an object store, in turn with none
SHARD = re.compile(rf"({AGAIN})?shard\.\d{{5,}}(\.\d{{5,}})?\.mds")
PART = re.compile(r"part\.(\d{5,})\.json")
HALF_WRITTEN = re.compile(r"\.(.+\.json)\.\d+")  # what a kill leaves of a file that was being written
SCRATCH = "scratch"  # a folder of shards that are being written


class OutputError(Exception):
    """Why the output cannot be written there, and what to do: one line for the user."""


class Output:
    """The place that ``--out`` names. One process holds it (`begin` to `end`); others may `put` into it meanwhile.

    Raises:
        OutputError, StorageError: if it can be no output.
    """

    def __init__(self, out: str) -> None:
        self.uri = out
        self.prefix = ""  # of shards' names
        self.lock: int | None = None
        self.begun = False  # what lies there is this conversion's, and not yet published
        self.path: Path | None = None  # of a folder; None for an object store
        if out.startswith("s3://"):
            self.store: LocalFolder | S3Folder = S3Folder(out)
            name = hashlib.sha256(f"{out.rstrip('/')} {os.environ.get('S3_ENDPOINT_URL')}".encode()).hexdigest()[:16]
            # By the output's name, so that what a killed run left there is found and removed.
            self.scratch_root = Path(tempfile.gettempdir(), f"to_mds-{os.getuid()}-{name}")
            return
        if "://" in out or out.startswith("dbfs:/"):
            raise OutputError(
                f"{out}: choose a folder or s3://BUCKET/PREFIX; for other stores, convert to a folder and copy it"
            )
        self.path = Path(out).expanduser().resolve()
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{out} is a file: choose another --out")
        if self.path.is_mount():
            raise OutputError(f"{out} is a mount point, which cannot be renamed: choose a folder inside it")
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.store = LocalFolder(str(self.partial))
        self.scratch_root = self.partial / SCRATCH

    # --- What is there ---

    def is_done(self, source: dict[str, Any], overwrite: bool) -> bool:
        """Whether the whole conversion of this source is there. False: the place is free, or may be replaced.

        A ``source`` that hasn't been looked into yet is compared in the rest alone.

        Raises:
            OutputError: if something else is there.
        """
        files = _entries(self.path) if self.path else self.store.listing()
        _refuse_foreign(self.uri, files)
        if not files or (self.path is None and PLAN_NAME in files and INDEX_NAME not in files):
            return False
        text = self._read_final(SPEC_NAME)
        if text is None:  # MDS shards of another program
            raise OutputError(f"{self.uri} holds shards without {SPEC_NAME}, not this program's: choose another --out")
        if overwrite:
            return False
        try:
            there = DataSpec.from_json(text, f"{self.uri}/{SPEC_NAME}").source
        except ValueError as error:
            raise OutputError(f"{error}: choose another --out") from None
        if difference := changes(there, {key: there[key] for key in LATE if key in there} | source):
            raise OutputError(f"{self.uri} is another conversion ({difference}): --overwrite replaces it")
        shards = self._shards_of_index(files)
        if shards is None:
            raise OutputError(f"{self.uri} is damaged: shards that its {INDEX_NAME} names are missing; say --overwrite")
        if PLAN_NAME in files and self._plan_of(self._final()).get("source") == there:  # a kill behind the index
            with suppress(OutputError):  # or a run that is just there
                self._take()
                if self.path:
                    _remove_replaced(self.path)
                    with suppress(OSError):  # unless it is empty
                        self.partial.rmdir()
                _delete(self._final(), files, {*shards, INDEX_NAME, SPEC_NAME})
        return True

    def _shards_of_index(self, files: dict[str, int]) -> set[str] | None:
        """The names of the index's shards, if all are there with their sizes."""
        try:
            shards = [shard["raw_data"] for shard in json.loads(self._read_final(INDEX_NAME) or "")["shards"]]
            whole = all(files.get(shard["basename"]) == shard["bytes"] for shard in shards)
            return {shard["basename"] for shard in shards} if whole else None
        except (ValueError, KeyError, TypeError):
            return None

    @staticmethod
    def _plan_of(store: LocalFolder | S3Folder) -> dict[str, Any]:
        """The record of the plan that lies there; empty if none that can be read does."""
        try:
            content = json.loads(store.read(PLAN_NAME) or "{}")
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def _final(self) -> LocalFolder | S3Folder:
        return LocalFolder(str(self.path)) if self.path else self.store

    def _read_final(self, name: str) -> str | None:
        content = self._final().read(name)
        return None if content is None else content.decode("utf-8", "replace")

    # --- A conversion's course: begin, put, publish, end ---

    def begin(self, plan: Plan, overwrite: bool) -> dict[int, dict[str, Any]]:
        """Takes the place. Returns the records of those of the plan's parts that are finished, by number.

        Raises:
            OutputError: if another conversion is at work there, or has been begun under another plan.
        """
        self._take()
        files = _entries(self.partial) if self.path else self.store.listing()
        if self.path and PLAN_NAME in files:
            files.pop(SCRATCH, None)
        _refuse_foreign(self.store.uri, files)
        if self.path and files and PLAN_NAME not in files:
            raise OutputError(f"{self.store.uri} holds shards, but no {PLAN_NAME} of a conversion: move it away")
        there = self._compare(self._plan_of(self.store), plan, overwrite) if PLAN_NAME in files else None
        self.begun = True
        self._clear_scratch()
        if there is None:
            self._clear(files)
            self.prefix = self._new_prefix()
            self.store.write(PLAN_NAME, _json({"prefix": self.prefix, **plan.record()}))
            return {}
        self.prefix = there["prefix"]
        records = {}
        for name in filter(PART.fullmatch, sorted(files)):
            with suppress(ValueError):  # a power cut may leave an empty one
                record = json.loads(self.store.read(name) or "")
                if _are_there(record["shards"], files):
                    records[record["part"]] = record
        return records

    def _compare(self, there: dict[str, Any], plan: Plan, overwrite: bool) -> dict[str, Any] | None:
        """The record of the plan that was begun there, if it is this plan; None to begin anew."""
        now = plan.record()
        if there.get("digest") == now["digest"]:
            return there
        if overwrite:
            return None
        difference = changes(there.get("source", {}), now["source"]) or "the source's files have changed"
        raise OutputError(
            f"{self.store.uri} is the beginning of another conversion ({difference}"
            f"{changed_file(there.get('files'), plan.reading.files)}): --overwrite begins anew"
        )

    def _clear(self, files: dict[str, int]) -> None:
        """Removes what an earlier attempt left. In an object store an earlier conversion lies there, too, and stays."""
        _delete(self.store, files, set() if self.path else {INDEX_NAME, SPEC_NAME} | self._named_shards())

    def _named_shards(self) -> set[str]:
        try:
            index = json.loads(self._read_final(INDEX_NAME) or "{}")
            return {shard["raw_data"]["basename"] for shard in index.get("shards", [])}
        except (ValueError, KeyError, TypeError):
            return set()

    def _new_prefix(self) -> str:
        earlier = self._named_shards() if self.path is None else set()
        return AGAIN if any(name.startswith("shard.") for name in earlier) else ""

    def _take(self) -> None:
        place = self.partial if self.path else self.scratch_root
        try:
            place.mkdir(parents=True, exist_ok=True, mode=0o777 if self.path else 0o700)
        except OSError as error:
            raise OutputError(f"cannot make {place}: {error.strerror}") from error
        lock = os.open(place, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except BlockingIOError:
            os.close(lock)
            raise OutputError(f"another conversion is writing to {self.uri}: wait, or choose another --out") from None
        self.lock = lock

    def _clear_scratch(self) -> None:
        if self.path:
            shutil.rmtree(self.scratch_root, ignore_errors=True)
            return
        for entry in self.scratch_root.iterdir():
            shutil.rmtree(entry, ignore_errors=True)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A new, empty local folder, from which files are `put`."""
        self.scratch_root.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = Path(tempfile.mkdtemp(dir=self.scratch_root))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, file: Path) -> None:
        """Moves a file there, under its own name. It appears whole, or not at all.

        Raises:
            StorageError, OSError: if it didn't arrive.
        """
        if self.path:
            os.replace(file, self.partial / file.name)
        else:
            self.store.upload(file, file.name)
            file.unlink()

    def finish_part(self, record: dict[str, Any]) -> None:
        """Notes that a part's shards are all there."""
        self.store.write(f"part.{record['part']:05}.json", _json(record))

    def publish(self, spec: DataSpec, records: list[dict[str, Any]]) -> None:
        """Makes the conversion visible, in the place of any earlier one.

        Raises:
            OutputError: if a shard is not there with its size.
        """
        files = self.store.listing()
        shards = [shard for record in records for shard in record["shards"]]
        for shard in shards:
            if not _are_there([shard], files):
                name = shard["raw_data"]["basename"]
                raise OutputError(f"{self.store.uri}/{name} has been lost since it was written: run it again")
        index = json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode()
        if self.path is None:
            self.store.delete([INDEX_NAME, SPEC_NAME])  # the index first
        self.store.write(SPEC_NAME, spec.to_json().encode())
        self.store.write(INDEX_NAME, index)
        self._clear_scratch()
        if self.path:
            for folder in (self.partial, self.path):  # since it began, somebody may have put something there
                _refuse_foreign(str(folder), _entries(folder))
            _swap(self.partial, self.path)
        self.begun = False
        named = {shard["raw_data"]["basename"] for shard in shards} | {INDEX_NAME, SPEC_NAME}
        _delete(self._final(), files, named)

    def end(self) -> None:
        """Lets go of the place. Finished parts stay, for the next run; if there is none, nothing does."""
        if self.lock is None:
            return
        if self.begun:
            self._clear_scratch()
            with suppress(StorageError):  # the store may be why the conversion failed; the next one clears up
                files = self.store.listing()
                if not (any(map(PART.fullmatch, files)) and any(map(SHARD.fullmatch, files))):
                    self._clear(files)
        if self.path is None:
            shutil.rmtree(self.scratch_root, ignore_errors=True)
        elif self.begun or not self.path.exists():
            with suppress(OSError):  # unless it is empty
                self.partial.rmdir()
        os.close(self.lock)
        self.lock = None


def is_ours(name: str) -> bool:
    """Whether conversions write files of that name."""
    if half := HALF_WRITTEN.fullmatch(name):
        name = half[1]
    return name in (SPEC_NAME, INDEX_NAME, PLAN_NAME) or bool(SHARD.fullmatch(name) or PART.fullmatch(name))


def _refuse_foreign(uri: str, files: Iterable[str]) -> None:
    if foreign := sorted(name for name in files if not is_ours(name)):
        raise OutputError(
            f"{uri} holds what this program did not write ({', '.join(foreign[:3])}): choose another --out"
        )


def _delete(store: LocalFolder | S3Folder, names: Iterable[str], keep: set[str]) -> None:
    """Deletes those of the names that are a conversion's, but for some; the plan last, as it tells whose they are."""
    store.delete(sorted((name for name in names if is_ours(name) and name not in keep), key=PLAN_NAME.__eq__))


def _entries(folder: Path) -> dict[str, int]:
    """The names and bytes of all that a folder holds."""
    return {entry.name: entry.lstat().st_size for entry in folder.iterdir()} if folder.is_dir() else {}


def _are_there(shards: list[dict[str, Any]], files: dict[str, int]) -> bool:
    return all(files.get(shard["raw_data"]["basename"]) == shard["raw_data"]["bytes"] for shard in shards)


def _swap(partial: Path, path: Path) -> None:
    """Renames a folder to the place of another conversion, if there is one, which goes."""
    earlier = path.with_name(f"{path.name}.replaced-{os.getpid()}")
    if path.exists():
        path.rename(earlier)
    partial.rename(path)
    _remove_replaced(path)


def _remove_replaced(path: Path) -> None:
    """Removes the conversions that the one there has replaced."""
    for folder in path.parent.glob(f"{glob.escape(path.name)}.replaced-*"):  # also of runs that were killed here
        names = _entries(folder)
        if SPEC_NAME in names and all(map(is_ours, names)):
            shutil.rmtree(folder, ignore_errors=True)


def _json(content: Any) -> bytes:
    return (json.dumps(content) + "\n").encode()
