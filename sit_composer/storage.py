"""A folder of files, on a file system or in object storage: they are listed, read, written, replaced and deleted."""

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

from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
from urllib3.exceptions import HTTPError

from sit_composer.cli import CREDENTIALS, s3_endpoint
from sit_composer.clouds import CloudFolder, check_store
from sit_composer.errors import StorageError, is_disk_full, one_line

ATTEMPTS = 6  # of a request to a store
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 30  # seconds without a byte
NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError)
REFUSED = ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")  # codes of S3


class LocalFolder:
    """A folder of the file system, with files and folders of files in it. It need not exist yet."""

    def __init__(self, path: str):
        self.uri = path
        self.path = Path(path)
        self._made = False

    def listing(self) -> dict[str, int]:
        """The bytes of every file, by its name in the folder: "config.yaml", "ep0-ba10/.metadata"."""
        sizes = {}
        with self._errors():
            for folder, _, names in os.walk(self.path):
                for name in names:
                    file = Path(folder, name)
                    with suppress(FileNotFoundError):  # a live run has just renamed or pruned it
                        state = file.lstat()
                        if stat.S_ISREG(state.st_mode):
                            sizes[file.relative_to(self.path).as_posix()] = state.st_size
        return sizes

    def read(self, name: str) -> bytes | None:
        """A small file's content; None if there is no such file."""
        with self._errors(), suppress(FileNotFoundError):
            return (self.path / name).read_bytes()
        return None

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file, whole or not at all."""
        with self._errors():
            self._make()
            temporary = self.path / f".{name}.{os.getpid()}"
            temporary.write_bytes(content)
            temporary.replace(self.path / name)

    def append(self, name: str, content: bytes) -> None:
        """Writes behind the end of a file, which need not exist; a kill may leave a part of the content."""
        with self._errors():
            self._make()
            with open(self.path / name, "ab") as file:
                file.write(content)

    def replace(self, name: str, before: bytes | None, content: bytes | None) -> bool:
        """Writes a small file if it holds ``before`` (None: doesn't exist); content None deletes it. Whether it did.

        If several processes try together, exactly one does.
        """
        file = self.path / name
        with self._errors():
            if before is None:
                self._make()
            try:
                if before is None:
                    with open(file, "xb") as new:  # a kill here leaves an empty file
                        new.write(content)
                    return True
                with open(file, "rb") as old:
                    try:
                        fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed, also by a kill
                    except BlockingIOError:
                        return False
                    except OSError:  # a file system without locks
                        pass
                    # If it was just replaced, the locked file isn't the one of that name any more.
                    if not os.path.samestat(os.fstat(old.fileno()), file.stat()) or old.read() != before:
                        return False
                    self.delete([name]) if content is None else self.write(name, content)
                    return True
            except (FileExistsError, FileNotFoundError):
                return False

    def _make(self) -> None:
        self._made |= not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)

    def delete(self, names: list[str]) -> None:
        """Deletes files; a missing one is no error. Deletes their folders too, once empty."""
        with self._errors():
            for name in names:
                (self.path / name).unlink(missing_ok=True)
            kept = set() if self._made else {self.path}
            for parent in sorted({(self.path / name).parent for name in names} - kept, reverse=True):
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()

    def is_whole(self, name: str) -> bool:
        """Whether a checkpoint of one file was written to its end."""
        # A live run may have just pruned it. is_zipfile alone would hide why it can't be opened.
        with self._errors(), suppress(FileNotFoundError), open(self.path / name, "rb") as file:
            return zipfile.is_zipfile(file)
        return False

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{error.filename or self.uri}: {error.strerror or error}") from error


class S3Folder:
    """A prefix of an S3 bucket, with the methods of `LocalFolder`. Every request is tried six times.

    `s3_endpoint` names another store than AWS; credentials come from the environment.
    """

    def __init__(self, uri: str):
        import boto3  # takes half a second, and a folder of the file system doesn't need it
        from botocore.config import Config  # like boto3

        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]+", bucket):
            raise StorageError("s3://: expected a bucket's name after it (credentials come from the environment)")
        self.uri = uri.rstrip("/")
        self.client_errors = (boto3.exceptions.Boto3Error,)
        self.bucket = bucket
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        retries = {"mode": "standard", "total_max_attempts": ATTEMPTS}  # with backoff
        timeouts = {"connect_timeout": CONNECT_TIMEOUT, "read_timeout": READ_TIMEOUT}
        config, endpoint = Config(retries=retries, tcp_keepalive=True, **timeouts), s3_endpoint()
        with self._errors():
            self.client = boto3.Session().client("s3", endpoint_url=endpoint, config=config)

    def listing(self) -> dict[str, int]:
        with self._errors():
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
            objects = (found for page in pages for found in page.get("Contents", []))
            return {found["Key"].removeprefix(self.prefix): found["Size"] for found in objects}

    def before_writing(self, check: Callable[[], object]) -> None:
        """Calls ``check`` before each request that makes an object appear, retries included; its errors stop it."""
        for operation in ("PutObject", "CompleteMultipartUpload"):
            self.client.meta.events.register(f"request-created.s3.{operation}", lambda **_: check())

    def read(self, name: str) -> bytes | None:
        return self._get(name)[0]

    def _get(self, name: str) -> tuple[bytes | None, str]:
        """Content and ETag, which identifies the content in conditions."""
        with self._errors(name):
            attempt = 0
            while True:
                attempt += 1
                try:
                    answer = self.client.get_object(**self._where(name))
                except self.client.exceptions.NoSuchKey:
                    return None, ""
                try:
                    return answer["Body"].read(), answer["ETag"]
                except BotoCoreError:  # cut off or stalled in the middle, where the client doesn't retry
                    if attempt == ATTEMPTS:
                        raise
                time.sleep(random.random() * 2 ** (attempt - 1))

    def write(self, name: str, content: bytes) -> None:
        with self._errors(name):
            self.client.put_object(**self._where(name), Body=content)

    def replace(self, name: str, before: bytes | None, content: bytes | None) -> bool:
        condition = {"IfNoneMatch": "*"}
        if before is not None:
            found, etag = self._get(name)
            if found != before:
                return False
            condition = {"IfMatch": etag}
        action = self.client.delete_object if content is None else partial(self.client.put_object, Body=content)
        with self._errors(name):
            try:
                action(**self._where(name), **condition)
            except ClientError as error:
                code = error.response["Error"]["Code"]
                if code in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"):
                    # The request may have succeeded, its answer been lost, and the client have retried.
                    return self.read(name) == content
                if code != "NotImplemented":
                    raise
                action(**self._where(name))  # a store without conditions
        return True

    def upload(self, file: Path, name: str) -> None:
        """Uploads a file of any size; it appears once it is complete."""
        with self._errors(name):
            self.client.upload_file(str(file), self.bucket, self.prefix + name)

    def download(self, name: str, file: Path) -> None:
        """Downloads a file of any size."""
        with self._errors(name):
            try:
                self.client.download_file(self.bucket, self.prefix + name, str(file))
            except OSError as error:
                if is_disk_full(error):
                    raise StorageError(f"{file.parent}: {error.strerror}, for {self.uri}/{name}") from error
                raise

    def delete(self, names: list[str]) -> None:
        for name in names:
            with self._errors(name):
                self.client.delete_object(**self._where(name))

    def is_whole(self, name: str) -> bool:
        return True

    def _where(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + name}

    @contextmanager
    def _errors(self, name: str = "") -> Iterator[None]:
        try:
            yield
        except (BotoCoreError, ClientError, *self.client_errors, HTTPError, OSError) as error:
            code = error.response["Error"].get("Code") if isinstance(error, ClientError) else None
            advice = f"; {CREDENTIALS}" if isinstance(error, NO_CREDENTIALS) or code in REFUSED else ""
            reason = f"{one_line(error).rstrip('.')}{advice}"
            raise StorageError(f"{self.uri}{'/' if name else ''}{name}: {reason}") from error


RemoteFolder = S3Folder | CloudFolder
RunFolder = LocalFolder | RemoteFolder


def open_run_folder(uri: str) -> RunFolder:
    """The folder of that path or URI."""
    return open_store(uri) if "://" in uri else LocalFolder(uri)


def open_store(uri: str) -> RemoteFolder:
    """The folder of that URI in an object store: s3://, gs://, az:// or abfs://."""
    check_store(uri)
    return S3Folder(uri) if uri.startswith("s3://") else CloudFolder(uri)
