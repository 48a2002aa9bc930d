"""Where a conversion goes: a folder, or a prefix of an object store; and what may already be there.

A conversion is seen by nobody before it is whole. A folder is built beside its final place and then renamed; in an
object store shards come first and `index.json` last. An earlier conversion stays until the new one is whole.
Nothing that a conversion did not write is ever deleted.
"""

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from sit_composer.spec import SPEC_NAME, DataSpec

INDEX_NAME = "index.json"
AGAIN = "again-"  # prefix of the shards that replace earlier ones in an object store, in turn with none
SHARD = re.compile(rf"({AGAIN})?shard\.\d{{5,}}\.mds")


class OutputError(Exception):
    """Why the output cannot be written there, and what to do: one line for the user."""


class Place(Protocol):
    """A place for one conversion. The order of calls is begin, then retire and end, or discard."""

    uri: str
    remote: str | None  # where finished files are to be uploaded; None if the local folder is all
    prefix: str  # of shard names; known after `begin`

    def listing(self) -> dict[str, int]:
        """The names and bytes of all files there."""

    def read(self, name: str) -> str:
        """The text of one file there."""

    def begin(self) -> Path:
        """Clears what a killed run left and returns an empty local folder to write to."""

    def retire(self) -> None:
        """Called when all shards are there, before the spec and the index."""

    def end(self) -> None:
        """Puts the new conversion in the place of any earlier one."""

    def discard(self) -> None:
        """Removes all that was written since `begin`."""


def open_place(out: str) -> Place:
    """The place that ``--out`` names.

    Raises:
        OutputError: if it can be no output.
    """
    if out.startswith("s3://"):
        return Bucket(out)
    if "://" in out or out.startswith("dbfs:/"):
        raise OutputError(
            f"{out}: choose a folder or s3://BUCKET/PREFIX; for other stores, convert to a folder and copy it"
        )
    return Folder(out)


def is_done(place: Place, source: dict[str, Any], resume: bool, overwrite: bool) -> bool:
    """Whether the place already holds the whole conversion of this source. False: it is free, or may be replaced.

    Raises:
        OutputError: if something else is there, or something that neither option allows to replace.
    """
    files = place.listing()
    if not files:
        return False
    foreign = sorted(name for name in files if name not in (SPEC_NAME, INDEX_NAME) and not SHARD.fullmatch(name))
    # Only a bucket can hold shards of ours without a spec: those of a killed run.
    if foreign or (SPEC_NAME not in files and (INDEX_NAME in files or place.remote is None)):
        which = ", ".join(foreign[:3]) or f"shards without {SPEC_NAME}"
        raise OutputError(f"{place.uri} holds what this program did not write ({which}): choose another --out")
    try:
        spec = DataSpec.from_json(place.read(SPEC_NAME), f"{place.uri}/{SPEC_NAME}") if SPEC_NAME in files else None
    except ValueError as error:
        raise OutputError(f"{error}: choose another --out") from None
    if overwrite:
        return False
    if not resume:
        state = "a conversion" if INDEX_NAME in files else "an unfinished conversion"
        raise OutputError(f"{place.uri} exists and holds {state}: choose another --out, or say --resume or --overwrite")
    if spec is not None and spec.source != source:
        keys = sorted(key for key in {*spec.source, *source} if spec.source.get(key) != source.get(key))
        changes = "; ".join(f"{key} {spec.source.get(key)!r} there, {source.get(key)!r} now" for key in keys)
        raise OutputError(f"{place.uri} is the conversion of something else ({changes}): --overwrite replaces it")
    return INDEX_NAME in files and _is_whole(place, files)


def _is_whole(place: Place, files: dict[str, int]) -> bool:
    """Whether every shard that the index names is there with its size."""
    try:
        shards = [shard["raw_data"] for shard in json.loads(place.read(INDEX_NAME))["shards"]]
        return all(files.get(shard["basename"]) == shard["bytes"] for shard in shards)
    except (ValueError, KeyError, TypeError):
        return False


class Folder:
    """A local folder, built as FOLDER.partial."""

    remote = None
    prefix = ""

    def __init__(self, out: str) -> None:
        self.uri = out
        self.path = Path(out).expanduser().resolve()
        self.partial = self.path.with_name(self.path.name + ".partial")
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{out} is a file: choose another --out")
        if self.path.is_mount():
            raise OutputError(f"{out} is a mount point, which cannot be renamed: choose a folder inside it")

    def listing(self) -> dict[str, int]:
        return _list_folder(self.path)

    def read(self, name: str) -> str:
        return (self.path / name).read_text(encoding="utf-8")

    def begin(self) -> Path:
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make {self.partial}: {error.strerror}") from error
        self.lock = os.open(self.partial, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except BlockingIOError:
            os.close(self.lock)
            raise OutputError(
                f"another conversion is writing to {self.partial}: wait, or choose another --out"
            ) from None
        left = list(_list_folder(self.partial))
        foreign = [name for name in left if name not in (SPEC_NAME, INDEX_NAME) and not SHARD.fullmatch(name)]
        if foreign:
            os.close(self.lock)
            raise OutputError(f"{self.partial} holds what this program did not write ({foreign[0]}): move it away")
        for name in left:
            (self.partial / name).unlink()
        return self.partial

    def retire(self) -> None:
        pass

    def end(self) -> None:
        if self.path.exists():
            earlier = self.path.with_name(f"{self.path.name}.replaced-{os.getpid()}")
            self.path.rename(earlier)
            self.partial.rename(self.path)
            shutil.rmtree(earlier, ignore_errors=True)
        else:
            self.partial.rename(self.path)
        os.close(self.lock)

    def discard(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        os.close(self.lock)


def _list_folder(folder: Path) -> dict[str, int]:
    return {entry.name: entry.lstat().st_size for entry in folder.iterdir()} if folder.is_dir() else {}


class Bucket:
    """A prefix of an S3 bucket. S3_ENDPOINT_URL chooses another store than AWS, as it does for streaming."""

    def __init__(self, out: str) -> None:
        import boto3

        self.uri = self.remote = out.rstrip("/")
        self.bucket, _, key = self.uri.removeprefix("s3://").partition("/")
        self.folder = f"{key}/" if key else ""
        with self._errors():
            self.client = boto3.client("s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL"))

    def listing(self) -> dict[str, int]:
        with self._errors():
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.folder)
            objects = [found for page in pages for found in page.get("Contents", [])]
        return {o["Key"].removeprefix(self.folder): o["Size"] for o in objects if o["Key"] != self.folder}

    def read(self, name: str) -> str:
        with self._errors():
            return self.client.get_object(Bucket=self.bucket, Key=self.folder + name)["Body"].read().decode()

    def begin(self) -> Path:
        files = self.listing()
        try:
            shards = json.loads(self.read(INDEX_NAME))["shards"] if INDEX_NAME in files else []
            self.earlier = [shard["raw_data"]["basename"] for shard in shards]
        except (ValueError, KeyError, TypeError):
            self.earlier = []
        self._delete(name for name in files if SHARD.fullmatch(name) and name not in self.earlier)
        self.prefix = AGAIN if any(name.startswith("shard.") for name in self.earlier) else ""
        self.staging = Path(tempfile.mkdtemp(prefix="to_mds-"))
        self.retired = False
        return self.staging

    def retire(self) -> None:
        self.retired = True
        self._delete([INDEX_NAME, SPEC_NAME])  # the index first

    def end(self) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        self._delete(self.earlier)

    def discard(self) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        with suppress(OutputError):  # the store may be why the conversion failed; the next one clears up
            self._delete([INDEX_NAME, SPEC_NAME] if self.retired else [])
            self._delete(name for name in self.listing() if SHARD.fullmatch(name) and name not in self.earlier)

    def _delete(self, names: Iterable[str]) -> None:
        with self._errors():
            for name in names:
                self.client.delete_object(Bucket=self.bucket, Key=self.folder + name)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError, ValueError) as error:
            raise OutputError(f"{self.uri}: {error}") from error
