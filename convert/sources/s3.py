"""Files of a source in an object store, s3://BUCKET/KEY, read with pyarrow's client, which retries by itself.

`s3_endpoint` chooses a store other than AWS, as it does for streaming. Credentials are found where boto3 finds them.
"""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import pyarrow as pa
from pyarrow import fs

from convert.sources.names import MAGIC, SCHEME, when
from convert.sources.parts import InputError
from sit_composer.cli import CREDENTIALS, s3_endpoint

CHUNK = 8 << 20  # bytes per request, where there is more to read
LEAST = 1 << 16  # bytes per request, at least
ATTEMPTS = 10  # per request, with growing pauses: minutes
SILENCE = 30  # seconds without a byte, after which a request has failed


def list_remote(source: str) -> tuple[list[str], bool]:
    """The URIs of an object, of all objects below a prefix, or of all that a glob matches, sorted; no hidden ones. And
    whether it is a prefix. A glob's first names, if they exist, are meant as they are spelled."""
    segments = _path(source).split("/")
    with reading(source):
        store = _store()

        def kind(names: int) -> fs.FileType:
            return store.get_file_info("/".join(segments[:names])).type

        if kind(len(segments)) == fs.FileType.File:
            return [source], False
        magic = (k for k, segment in enumerate(segments) if MAGIC.search(segment))
        plain = next((k for k in magic if kind(k + 1) == fs.FileType.NotFound), len(segments))
        base = "/".join(segments[:plain])
        try:
            found = store.get_file_info(fs.FileSelector(base, recursive=True))
        except FileNotFoundError:  # no such prefix; a missing bucket is another error
            return [], False
    files = [info.path for info in found if info.type == fs.FileType.File]
    inside = [(file, file.removeprefix(base + "/").split("/")) for file in files]
    inside = [(file, names) for file, names in inside if not any(name.startswith(".") for name in names)]
    if plain < len(segments):
        inside = [(file, names) for file, names in inside if _matches(names, segments[plain:])]
    return sorted(SCHEME + file for file, _ in inside), plain == len(segments)


def _matches(names: list[str], patterns: list[str]) -> bool:
    """Whether a path's names match a glob's; ** stands for any number of folders."""
    if not patterns:
        return not names
    if patterns[0] == "**":
        return _matches(names, patterns[1:]) or (bool(names) and _matches(names[1:], patterns))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])


def fingerprint(uri: str) -> dict[str, Any]:
    """An object's URI, its bytes, and when it was modified."""
    with reading(uri):
        info = _store().get_file_info(_path(uri))
    if info.type != fs.FileType.File:
        raise InputError(f"{uri}: cannot be read: no such object")
    seconds = info.mtime_ns // 10**9  # some stores tell more in a listing than of an object
    return {"name": uri, "bytes": info.size, "modified": when(seconds * 10**9)}


class RemoteFile(io.RawIOBase):
    """An object, open for reading at any place.

    pyarrow's buffer for an answer has the requested size: a longer error text doesn't fit, and becomes an error that is
    not retried. So each request is for at least ``LEAST`` bytes, or ``window``, if the next bytes are needed soon.
    """

    def __init__(self, uri: str, window: int = 0) -> None:
        self.file = _store().open_input_file(_path(uri))
        self.bytes: int = self.file.size()
        self.window = window
        self.begin = self.place = 0
        self.held = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.bytes}[whence]
        return self.place

    def readinto(self, buffer: Any) -> int:
        end = max(min(self.place + len(buffer), self.bytes), self.place)
        if self.place < self.begin or end > self.begin + len(self.held):
            self.begin = max(min(self.place, self.bytes - LEAST), 0)
            last = min(max(end, self.begin + max(self.window, LEAST)), self.bytes)
            self.held = self.file.read_at(last - self.begin, self.begin)
        data = memoryview(self.held)[self.place - self.begin : end - self.begin]
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Converts pyarrow's errors to an InputError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        message = re.split(r"[. ]*Detail: ", str(error))[0].strip().partition("\n")[0]  # a traceback may follow it
        advice = f"; {CREDENTIALS}" if "ACCESS_DENIED" in message else ""
        raise InputError(f"{name}: cannot be read: {message.rstrip('.')}{advice}") from error


def _path(uri: str) -> str:
    path = uri.removeprefix(SCHEME).rstrip("/")
    bucket = path.partition("/")[0]
    if not bucket or not all(c.isalnum() or c in ".-_" for c in bucket):
        raise InputError("s3://: expected s3://BUCKET/KEY (credentials come from the environment)")
    return path


def _store() -> fs.S3FileSystem:
    attempts = os.environ.get("AWS_MAX_ATTEMPTS", "")
    return fs.S3FileSystem(
        endpoint_override=s3_endpoint(),
        region=os.environ.get("AWS_DEFAULT_REGION"),
        connect_timeout=SILENCE,
        request_timeout=SILENCE,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=int(attempts) if attempts.isdecimal() else ATTEMPTS),
    )
