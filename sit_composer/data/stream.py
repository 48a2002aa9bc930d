"""A stream of MDS shards that checks the index, the spec and the shards' bytes before it uses them."""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from botocore.exceptions import BotoCoreError, ClientError
from filelock import FileLock
from streaming import Stream
from streaming.base.format import Reader, reader_from_json
from streaming.base.hashing import get_hash, is_hash
from streaming.base.util import retry as retrying
from urllib3.exceptions import HTTPError

from sit_composer.cli import s3_endpoint
from sit_composer.data.azure_files import CloudDownloader
from sit_composer.data.spec import INDEX_NAME, SPEC_NAME, DataSpec
from sit_composer.errors import UserError
from sit_composer.storage import NO_CREDENTIALS, S3Folder, StorageError, is_disk_full

OUTAGE = 300  # seconds after which a failed attempt to fetch a shard is the last
# For each kind of data: the columns, and how their encodings may begin; those of features, which are of one size.
COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "pixels": {"image": ("bytes",), "label": ("int", "uint")},
    "latents": {"moments": ("ndarray:float16",), "moments_flip": ("ndarray:float16",), "label": ("int", "uint")},
    "features": {"features": ("ndarray:float16:",), "features_flip": ("ndarray:float16:",)},
}


class DataError(UserError):
    """What is wrong with the data, and where, in one line, also when a DataLoader's worker raised it."""

    def __init__(self, message: str) -> None:
        lines = str(message).strip().splitlines()
        if any(line.startswith("Original Traceback") for line in lines):
            # DataLoader re-raises a worker's error as type(error)(traceback), whose last line is the message.
            lines = [lines[-1].partition(": ")[2]]
        super().__init__(" ".join(" ".join(lines).split()))


def load_spec(remote: str | None, local: str) -> DataSpec:
    """Reads `spec.json` from ``remote``, never from a cached copy; or from the folder ``local`` without a remote."""
    text, uri = read_text(source(remote, local), local, SPEC_NAME)
    try:
        return DataSpec.from_json(text, uri)
    except ValueError as error:
        raise DataError(str(error)) from error


def source(remote: str | None, local: str) -> str | None:
    """``remote``, or None if the shards are in ``local`` itself, where nothing may be deleted."""
    return remote.rstrip("/") if remote and os.path.realpath(remote) != os.path.realpath(local) else None


def read_text(remote: str | None, local: str, name: str, timeout: float = 60, attempts: int = 2) -> tuple[str, str]:
    """The text of a small file of the data set, and the file's path or URI."""
    uri = os.path.join(remote or local, name)
    in_s3 = remote is not None and remote.startswith("s3://")
    if in_s3:
        s3_endpoint()
    try:
        if remote is None:
            return Path(uri).read_text(), uri
        with tempfile.TemporaryDirectory() as folder:
            copy = os.path.join(folder, name)
            # Not with the stream's own client: forked workers would share its open connections.
            retrying(num_attempts=attempts)(lambda: CloudDownloader.direct_download(uri, copy, timeout))()
            return Path(copy).read_text(), uri
    except Exception as error:
        if remote is not None and is_disk_full(error):
            raise DataError(f"{tempfile.gettempdir()}: no space left on the disk for {uri}") from error
        if isinstance(error, StorageError):  # Azure's
            raise DataError(str(error)) from error
        cause = f"{type(error).__name__}: {error}"
        if in_s3 and (isinstance(error, NO_CREDENTIALS) or not is_outage(error)):
            try:  # the client asks by HEAD, and the answer to that gives no reason
                cause = "no such object" if S3Folder(remote).read(name) is None else cause
            except StorageError as reason:
                raise DataError(str(reason)) from error
        raise DataError(f"{uri}: can't be read ({cause}); check the address, and that the shards are whole") from error


class CheckedStream(Stream):
    """A folder of MDS shards that are checked before they are used.

    A shard is checked by its size and by its xxh64, or by another hash if the index has no xxh64. Every rank reads the
    index from the remote itself. An invalid file in the cache is deleted; without a remote, no file is deleted.
    """

    def __init__(self, spec: DataSpec, download_retry: int, **kwargs: Any) -> None:
        super().__init__(download_retry=1, **kwargs)
        self.spec = spec
        self.attempts = download_retry

    def get_shards(self, world: Any, allow_unsafe_types: bool) -> list[Reader]:
        """The shards that the index lists. A DataError names what is missing, unsafe or contradicts the spec."""
        text, uri = read_text(self.remote, self.local, INDEX_NAME, self.download_timeout, min(2, self.attempts))
        self.index_size = len(text)
        shards = safe_shards(text, uri, self.local, self.spec, allow_unsafe_types)
        for shard in shards:
            if self.remote is None and (fault := self.fault(shard, hashes=False)):
                raise DataError(fault)
        samples, expected = sum(shard.samples for shard in shards), self.spec.samples
        if samples != expected:
            raise DataError(f"{uri}: got {samples} samples, expected {expected} as in {SPEC_NAME}: one file is stale")
        if self.remote is not None:
            claim_cache(self.local, self.remote)
        return shards

    def get_index_size(self) -> int:
        """The index's bytes, which count toward a ``cache_limit``."""
        return self.index_size

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: np.ndarray) -> None:
        """Notes which shards are here already."""
        if self.remote is None:
            # The stock method deletes files to tidy the folder. get_shards() has checked that every shard is there.
            cache_usage_per_shard[:] = [shard.get_raw_size() for shard in shards]
        else:
            super().set_up_local(shards, cache_usage_per_shard)

    def fault(self, shard: Reader, hashes: bool = True) -> str | None:
        """What is wrong with the shard's files here, and without a remote what to do; or None."""
        fault = shard_fault(shard, self.local, hashes)
        return f"{fault}; restore it, or write the shards again" if fault and self.remote is None else fault

    def prepare_shard(self, shard: Reader) -> int:
        """Fetches, decompresses and checks a shard. Returns by how many bytes the cache grew.

        If the store doesn't answer or asks to wait, retries for minutes; after any other error, retries once. If it
        raises, the cache has no file of the shard.
        """
        if self.remote is None and (fault := self.fault(shard, hashes=False)):
            raise FileNotFoundError(fault)
        start = time.monotonic()
        for attempt in range(self.attempts):
            try:
                return self._prepare_once(shard)
            except Exception as error:
                last = (self.attempts if is_outage(error) else min(2, self.attempts)) - 1
                if attempt >= last or self.remote is None or time.monotonic() - start > OUTAGE:
                    raise
            time.sleep(min(2**attempt, 30))
        raise ValueError(f"download_retry: got {self.attempts}, expected at least 1")

    def _prepare_once(self, shard: Reader) -> int:
        try:
            for _ in range(2):  # the transfer may have corrupted the bytes
                grown = super().prepare_shard(shard)
                fault = self.fault(shard)
                if fault is None:
                    return grown
                if self.remote is not None:
                    shard.evict()
            raise ValueError(fault)
        except Exception:
            if self.remote is not None:
                shard.evict()
            raise

    def path(self, shard: Reader) -> str:
        """The shard's file here, decompressed."""
        return os.path.join(self.local, shard.raw_data.basename)

    def where(self, shard: Reader) -> str:
        """The shard's file at its source."""
        return os.path.join(self.remote or self.local, shard_files(shard)[-1].basename)


def is_outage(error: Exception) -> bool:
    """Whether S3 doesn't answer, or asks to retry later."""
    from boto3.exceptions import Boto3Error  # takes half a second, and only S3 needs it

    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
        return status >= 500 or status in (408, 429)
    return isinstance(error, BotoCoreError | Boto3Error | HTTPError | ConnectionError | TimeoutError)


def safe_shards(text: str, uri: str, folder: str, spec: DataSpec, allow_unsafe_types: bool = False) -> list[Reader]:
    """The shards that the text of an index lists, in ``folder``. A DataError names the index's ``uri``."""
    shards = []
    needed = COLUMNS[spec.kind] | (COLUMNS["features"] if spec.features else {})
    try:
        for info in json.loads(text)["shards"]:
            if info["format"] != "mds":
                raise ValueError(f"the format is {info['format']!r}, not 'mds'")
            shard = reader_from_json(folder, None, info)
            shard.validate(allow_unsafe_types)
            for file in shard_files(shard):
                # A name such as ../x would be written outside the cache.
                if os.path.isabs(file.basename) or ".." in Path(file.basename).parts:
                    raise ValueError(f"the file name {file.basename!r} leads out of the folder")
                if type(file.bytes) is not int:
                    raise ValueError(f"the number of {file.basename}'s bytes is {file.bytes!r}")
            columns = dict(zip(shard.column_names, shard.column_encodings, strict=True))
            for name, encodings in needed.items():
                if not columns.get(name, "").startswith(encodings):
                    wanted = f"a column {name!r} encoded as {' or '.join(encodings)}"
                    raise DataError(f"{uri}: {spec.kind} need {wanted}; the columns there are {columns}")
            if not isinstance(shard.samples, int):
                raise ValueError(f"the number of samples is {shard.samples!r}")
            shards.append(shard)
    except DataError:
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        raise DataError(f"{uri}: not a whole and safe MDS index ({cause}); write the shards again") from error
    return shards


def shard_fault(shard: Reader, folder: str, hashes: bool = True) -> str | None:
    """What is wrong with the shard's files in a folder, or None."""
    files = {os.path.join(folder, file.basename): file for file in shard_files(shard)}
    here = [path for path in files if os.path.exists(path)]  # the plain or the compressed one, or both
    if not here:
        return f"{next(iter(files))} is missing"
    for path in here:
        size, known = files[path].bytes, files[path].hashes or {}
        name = next((name for name in ("xxh64", *known) if name in known and is_hash(name)), None)
        try:
            if (found := os.path.getsize(path)) != size:
                return f"{path} has {found} bytes; {INDEX_NAME} says {size}"
            if hashes and name and get_hash(name, Path(path).read_bytes()) != known[name]:
                return f"{path} has been changed: its {name} is not what {INDEX_NAME} says"
        except FileNotFoundError:  # another process has evicted the shard just now
            return f"{path} is missing"
    return None


def shard_files(shard: Reader) -> list[Any]:
    """The shard's files (basename, bytes, hashes): the plain one, and the compressed one if there is one."""
    return [file for file in shard.file_pairs[0] if file]


def claim_cache(local: str, remote: str) -> None:
    """Records the remote whose copies the folder holds, because shards of all data sets have the same names."""
    note = Path(local, "remote.txt")
    note.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{note}.lock"):
        owner = note.read_text() if note.exists() else ""
        if not owner:
            note.write_text(remote)
    if owner not in ("", remote):
        raise DataError(f"{local}: holds copies of {owner}, not of {remote}; choose another local folder, or empty it")


def read_first_sample(spec: DataSpec, remote: str | None, local: str) -> tuple[int, str]:
    """Reads the index and the first sample, and keeps no copy. Returns the number of shards, and the sample's file."""
    remote = source(remote, local)
    with tempfile.TemporaryDirectory() as folder:
        stream = CheckedStream(spec, 2, remote=remote, local=folder if remote else local)
        stream.apply_default({"split": None, "download_timeout": 60.0, "validate_hash": None, "keep_zip": False})
        shards = stream.get_shards(None, False)
        if not shards:
            raise DataError(f"{remote or local}: no shard")
        if remote is not None:
            stream.prepare_shard(shards[0])
        elif fault := stream.fault(shards[0]):
            raise DataError(fault)
        shards[0].get_item(0)
        return len(shards), stream.where(shards[0])
