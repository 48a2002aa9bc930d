"""A run's folder, on a file system or in object storage: its files are listed, read, written and replaced."""

import errno
import fcntl
import os
import random
import re
import stat
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Protocol

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from sit_composer.errors import UserError

ATTEMPTS = 6  # of a request to a store
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 30  # seconds without a byte


class StorageError(UserError):
    """Why a folder or an object store can't be used: what, where, and the store's own words."""


def is_disk_full(error: BaseException) -> bool:
    """Whether it was raised by a disk without space, also by torch's writers of checkpoints."""
    causes = [error, *(failure[0] for failure in getattr(error, "failures", {}).values())]  # torch's, of the ranks
    return any(
        getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        # torch's archive writer says this when a write came out short, and nothing of why.
        or (isinstance(cause, RuntimeError) and re.search(r"PytorchStreamWriter failed|unexpected pos \d+", str(cause)))
        for cause in causes
    )


class RunFolder(Protocol):
    """A folder with files in it, and folders of files."""

    uri: str

    def listing(self) -> dict[str, int]:
        """The bytes of every file, by its name in the folder: "config.yaml", "ep0-ba10/.metadata"."""

    def read(self, name: str) -> bytes | None:
        """A small file's content; None if it isn't there."""

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file, all of it or nothing."""

    def replace(self, name: str, before: bytes | None, content: bytes | None) -> bool:
        """Writes a small file if it holds ``before`` (None: isn't there); no content deletes it. Whether it did.

        Of several that try so at once, one does.
        """

    def delete(self, names: list[str]) -> None:
        """Deletes files; one that isn't there is no error."""

    def is_whole(self, name: str) -> bool:
        """Whether a checkpoint of one file was written to its end."""


def open_run_folder(uri: str) -> RunFolder:
    """The folder of that path or s3:// URI; it need not exist yet.

    Raises:
        StorageError: if it can be none.
    """
    if uri.startswith("s3://"):
        return S3Folder(uri)
    if "://" in uri:
        raise StorageError(f"{uri.split('://')[0]}://: not an object store that is known here; take s3://, or a folder")
    return LocalFolder(uri)


class LocalFolder:
    """A folder of the file system."""

    def __init__(self, path: str):
        self.uri = path
        self.path = Path(path)
        self._made = False

    def listing(self) -> dict[str, int]:
        sizes = {}
        with self._errors():
            for folder, _, names in os.walk(self.path):
                for name in names:
                    file = Path(folder, name)
                    with suppress(FileNotFoundError):  # one that a live run has just renamed or pruned
                        state = file.lstat()
                        if stat.S_ISREG(state.st_mode):
                            sizes[file.relative_to(self.path).as_posix()] = state.st_size
        return sizes

    def read(self, name: str) -> bytes | None:
        with self._errors():
            try:
                return (self.path / name).read_bytes()
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        with self._errors():
            self._make()
            temporary = self.path / f".{name}.{os.getpid()}"
            temporary.write_bytes(content)
            temporary.replace(self.path / name)

    def replace(self, name: str, before: bytes | None, content: bytes | None) -> bool:
        file = self.path / name
        with self._errors():
            if before is None:
                self._make()
            try:
                if before is None:
                    with open(file, "xb") as new:  # whose process may be killed here; then it is an empty one
                        new.write(content)
                else:
                    with open(file, "rb") as old:
                        _lock(old)
                        # Who locks one that was just replaced has a file that isn't there any more.
                        if not os.path.samestat(os.fstat(old.fileno()), file.stat()) or old.read() != before:
                            return False
                        self.delete([name]) if content is None else self.write(name, content)
            except (FileExistsError, FileNotFoundError, BlockingIOError):
                return False
        return True

    def _make(self) -> None:
        self._made |= not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)

    def delete(self, names: list[str]) -> None:
        with self._errors():
            for name in names:
                (self.path / name).unlink(missing_ok=True)
            ours = {(self.path / name).parent for name in names} - ({self.path} if not self._made else set())
            for parent in sorted(ours, reverse=True):
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()

    def is_whole(self, name: str) -> bool:
        with self._errors():
            try:
                with open(self.path / name, "rb") as file:  # opened here: is_zipfile hides why it can't
                    return zipfile.is_zipfile(file)
            except FileNotFoundError:  # a live run has just pruned it
                return False

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{error.filename or self.uri}: {error.strerror or error}") from error


def _lock(file: IO[bytes]) -> None:
    """Locks an open file; the system lets go when it is closed, also by a kill.

    Raises:
        BlockingIOError: if another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks: then by the look alone
        pass


class S3Folder:
    """A prefix of an S3 bucket; S3_ENDPOINT_URL names another store than AWS. Every request is tried six times."""

    def __init__(self, uri: str):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]+", bucket):
            raise StorageError("s3://: no bucket's name behind it (credentials come from the environment)")
        self.uri = uri.rstrip("/")
        self.bucket = bucket
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        patient = Config(
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},  # with backoff
            connect_timeout=CONNECT_TIMEOUT,
            read_timeout=READ_TIMEOUT,
            tcp_keepalive=True,
        )
        with self._errors(self.uri):
            self.client = boto3.Session().client("s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL"), config=patient)

    def listing(self) -> dict[str, int]:
        with self._errors(self.uri):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
            objects = [found for page in pages for found in page.get("Contents", [])]
        return {found["Key"].removeprefix(self.prefix): found["Size"] for found in objects}

    def before_writing(self, check: Callable[[], None]) -> None:
        """Calls ``check`` before each request by which an object appears, also one made again; its errors end it."""
        for operation in ("PutObject", "CompleteMultipartUpload"):
            self.client.meta.events.register(f"request-created.s3.{operation}", lambda **_: check())

    def read(self, name: str) -> bytes | None:
        found = self._get(name)
        return None if found is None else found[0]

    def _get(self, name: str) -> tuple[bytes, str] | None:
        """Content and ETag, which stands for the content in conditions."""
        with self._errors(f"{self.uri}/{name}"):
            for attempt in range(ATTEMPTS):
                try:
                    answer = self.client.get_object(Bucket=self.bucket, Key=self.prefix + name)
                except self.client.exceptions.NoSuchKey:
                    return None
                try:
                    return answer["Body"].read(), answer["ETag"]
                except BotoCoreError:  # cut off, or stalled, in the middle, where the client doesn't try again
                    if attempt == ATTEMPTS - 1:
                        raise
                time.sleep(random.random() * 2**attempt)

    def write(self, name: str, content: bytes) -> None:
        with self._errors(f"{self.uri}/{name}"):
            self.client.put_object(Bucket=self.bucket, Key=self.prefix + name, Body=content)

    def replace(self, name: str, before: bytes | None, content: bytes | None) -> bool:
        condition = {"IfNoneMatch": "*"}
        if before is not None:
            found = self._get(name)
            if found is None or found[0] != before:
                return False
            condition = {"IfMatch": found[1]}
        where = {"Bucket": self.bucket, "Key": self.prefix + name}
        action = self.client.delete_object if content is None else partial(self.client.put_object, Body=content)
        with self._errors(f"{self.uri}/{name}"):
            try:
                action(**where, **condition)
            except ClientError as error:
                code = error.response["Error"]["Code"]
                if code == "NotImplemented":  # a store without conditions: then by the look alone
                    action(**where)
                elif code in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"):
                    # It may have been done, the answer lost, and been asked for again.
                    return self.read(name) == content
                else:
                    raise
        return True

    def upload(self, file: Path, name: str) -> None:
        """Uploads a file of any size; it appears when all of it is there."""
        with self._errors(f"{self.uri}/{name}"):
            self.client.upload_file(str(file), self.bucket, self.prefix + name)

    def download(self, name: str, file: Path) -> None:
        """Downloads a file of any size."""
        with self._errors(f"{self.uri}/{name}"):
            try:
                self.client.download_file(self.bucket, self.prefix + name, str(file))
            except OSError as error:
                if is_disk_full(error):
                    raise StorageError(f"{file.parent}: {error.strerror}, for {self.uri}/{name}") from error
                raise

    def delete(self, names: list[str]) -> None:
        for name in names:
            with self._errors(f"{self.uri}/{name}"):
                self.client.delete_object(Bucket=self.bucket, Key=self.prefix + name)

    def is_whole(self, name: str) -> bool:
        return True

    @contextmanager
    def _errors(self, where: str) -> Iterator[None]:
        try:
            yield
        except (BotoCoreError, ClientError, Boto3Error, HTTPError, OSError) as error:
            raise StorageError(f"{where}: {' '.join(str(error).split())}") from error
