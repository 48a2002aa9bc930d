"""A folder in Google's or Azure's object store, read and written with obstore.

It signs and retries requests, and finds credentials in the environment, in files, or from the machine. Both stores
have the conditional writes that a lease needs: Google's by an object's generation, Azure's by its ETag.
"""

import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from sit_composer.cli import require
from sit_composer.errors import USAGE, StorageError, is_disk_full

AZURE = ("az", "abfs", "abfss")
EXPECTED = "expected s3://, gs://, az://, abfs:// or a folder"
HUB = "the Hugging Face Hub has no conditional writes, by which a second one is refused"
VARIABLES = {
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT, a file's path",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
}
ENDPOINTS = ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "GOOGLE_BASE_URL")  # obstore's, of other stores than theirs
ATTEMPTS, PAUSE = 6, 8  # of a request, and the most seconds between two
PATIENCE, WRITERS_PATIENCE = 60, 15  # seconds after which a failed attempt is the last
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 30  # seconds; the second also for sending a part
PART, PARTS = 8 << 20, 9_000  # the least bytes of a file's part; and the most parts, of which Google takes 10,000
AT_ONCE = 4  # parts of a file on their way
TRY_AGAIN = 75  # exit code: a failure that may pass, as in sysexits.h
OUTAGE = re.compile(r"HTTP error|(\(|code: )(408|429|5\d\d) ")
NO_PLACE = re.compile(r"ContainerNotFound|ContainerBeingDeleted|NoSuchBucket")
REFUSED = re.compile(r"\b40[13]\b|token|credential|account|access key|private_key", re.IGNORECASE)


def check_store(uri: str) -> None:
    """Raises StorageError unless the URI is of a store that a run or a conversion can be written to."""
    scheme, _, place = uri.partition("://")
    if scheme == "hf":
        raise StorageError(f"{scheme}://: holds no runs and conversions, as {HUB}; {EXPECTED}")
    if scheme not in ("s3", "gs", *AZURE):
        raise StorageError(f"{scheme}://: an unknown object store, {EXPECTED}")
    if scheme == "s3":
        return
    name = place.partition("/")[0]
    if not re.fullmatch(r"[\w$][\w.-]*", name):
        azure = " (AZURE_STORAGE_ACCOUNT_NAME is for the account's)"
        what = "bucket's name after it" if scheme == "gs" else f"container's name after it{azure}"
        raise StorageError(f"{scheme}://: expected a {what}")
    require(f"{scheme}://{name}", "obstore")


class CloudFolder:
    """A prefix of a bucket or container, with the methods of `storage.S3Folder`: gs://BUCKET/PREFIX, az://CONTAINER/PREFIX
    or abfs://CONTAINER/PREFIX. A request that fails is made again for about a minute.
    """

    def __init__(self, uri: str):
        check_store(uri)
        import obstore  # optional

        self.obstore = obstore
        self.uri = uri.rstrip("/")
        scheme, _, place = self.uri.partition("://")
        self.kind = "gs" if scheme == "gs" else "az"
        self.bucket, _, prefix = place.partition("/")
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._check: Callable[[], object] = lambda: None
        self.store = self._connect(PATIENCE)

    def _connect(self, patience: float) -> Any:
        stores = self.obstore.store
        limits = {"connect_timeout": CONNECT_TIMEOUT, "read_timeout": READ_TIMEOUT, "timeout": 10 * READ_TIMEOUT}
        client: dict[str, Any] = {name: timedelta(seconds=seconds) for name, seconds in limits.items()}
        client["allow_http"] = any(os.environ.get(name, "").startswith("http://") for name in ENDPOINTS)
        backoff = {"init_backoff": timedelta(seconds=0.5), "max_backoff": timedelta(seconds=PAUSE)}
        retries = {"max_retries": ATTEMPTS - 1, "retry_timeout": timedelta(seconds=patience), "backoff": backoff}
        with self._errors():
            kind = stores.GCSStore if self.kind == "gs" else stores.AzureStore
            return kind(self.bucket, client_options=client, retry_config=retries)

    def before_writing(self, check: Callable[[], object]) -> None:
        """Calls ``check`` before an object is made to appear; its errors stop it.

        obstore's own retries of that request are not checked, and therefore end soon.
        """
        self._check = check
        self.store = self._connect(WRITERS_PATIENCE)

    def listing(self) -> dict[str, int]:
        with self._errors():
            found = self._persist(lambda: self.obstore.list(self.store, prefix=self.prefix or None).collect())
            return {entry["path"].removeprefix(self.prefix): entry["size"] for entry in found}

    def read(self, name: str) -> bytes | None:
        return self._get(name)[0]

    def _get(self, name: str) -> tuple[bytes | None, dict[str, str]]:
        """Content, and what identifies it in conditions."""
        with self._errors(name):
            try:
                return self._persist(lambda: self._get_once(name))
            except FileNotFoundError as error:
                if NO_PLACE.search(str(error)):
                    raise
                return None, {}

    def _get_once(self, name: str) -> tuple[bytes, dict[str, str]]:
        answer = self.obstore.get(self.store, self.prefix + name)
        return bytes(answer.bytes()), {k: answer.meta[k] for k in ("e_tag", "version") if answer.meta[k] is not None}

    def write(self, name: str, content: bytes) -> None:
        with self._errors(name):
            self._persist(lambda: self._put(name, content))

    def _put(self, name: str, content: bytes, mode: str | dict[str, str] = "overwrite") -> None:
        self._check()
        self.obstore.put(self.store, self.prefix + name, content, mode=mode, use_multipart=False)

    def replace(self, name: str, before: bytes | None, content: bytes | None) -> bool:
        mode: str | dict[str, str] = "create"
        if before is not None:
            found, mode = self._get(name)
            if found != before:
                return False
        failed = self.obstore.exceptions.AlreadyExistsError, self.obstore.exceptions.PreconditionError
        with self._errors(name):
            try:
                self._put(name, content or b"", mode)
            except (*failed, FileNotFoundError) as error:
                if NO_PLACE.search(str(error)):
                    raise
                # The request may have succeeded, its answer been lost, and the client have retried.
                if self.read(name) != (content or b""):
                    return False
        if content is None:  # obstore deletes without conditions; emptied, the file is this process's for three beats
            with self._errors(name), suppress(FileNotFoundError):
                self.obstore.delete(self._connect(WRITERS_PATIENCE), self.prefix + name)
        return True

    def upload(self, file: Path, name: str) -> None:
        """Uploads a file of any size; it appears once it is complete."""
        part = max(PART, file.stat().st_size // PARTS + 1)
        with self._errors(name), open(file, "rb") as source:
            # Left open after an error, it makes nothing appear.
            target = self.obstore.open_writer(self.store, self.prefix + name, buffer_size=part, max_concurrency=AT_ONCE)
            while content := source.read(part):
                target.write(content)
            self._check()  # once: `close` waits for the last parts, and puts all together
            target.close()

    def download(self, name: str, file: Path) -> None:
        """Downloads a file of any size, of one version."""
        with self._errors(name), ThreadPoolExecutor(AT_ONCE) as pool:
            path = self.prefix + name
            meta = self.obstore.head(self.store, path)
            starts = range(0, meta["size"], PART)

            def fetch(start: int) -> Any:
                options = {"range": (start, min(start + PART, meta["size"])), "if_match": meta["e_tag"]}
                return self._persist(lambda: self.obstore.get(self.store, path, options=options).bytes())

            try:
                with open(file, "wb") as target:
                    for i in range(0, len(starts), AT_ONCE):
                        target.writelines(pool.map(fetch, starts[i : i + AT_ONCE]))
            except OSError as error:
                if is_disk_full(error):
                    raise StorageError(f"{file.parent}: {error.strerror}, for {self.uri}/{name}") from error
                raise

    def delete(self, names: list[str]) -> None:
        for name in names:
            with self._errors(name), suppress(FileNotFoundError):
                self._persist(partial(self.obstore.delete, self.store, self.prefix + name))

    def is_whole(self, name: str) -> bool:
        return True

    def _persist(self, action: Callable[[], Any]) -> Any:
        """Calls it again where obstore doesn't: an answer was cut off, or a POST stalled."""
        start = time.monotonic()
        for attempt in range(ATTEMPTS):
            try:
                return action()
            except self.obstore.exceptions.BaseError as error:
                late = time.monotonic() - start > PATIENCE
                if late or attempt == ATTEMPTS - 1 or not OUTAGE.search(_reason(error)):
                    raise
            time.sleep(random.random() * 2**attempt)

    @contextmanager
    def _errors(self, name: str = "") -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except (self.obstore.exceptions.BaseError, OSError, ValueError) as error:
            reason = _reason(error)
            advice = f"; credentials are read from {VARIABLES[self.kind]}" if REFUSED.search(reason) else ""
            raise StorageError(f"{self.uri}{'/' if name else ''}{name}: {reason}{advice}") from error


def _reason(error: Exception) -> str:
    """The store's or the client's reason, without addresses, whose queries may hold a signature."""
    text, _, details = str(error).partition("Debug source")
    if code := re.search(r"<Code>(\w+)</Code>", text):
        status, said = re.search(r"status code: (\d+)", text), re.search(r"<Message>([^<\n]+)", text)
        return f"{said[1].strip().rstrip('.') if said else 'refused'} ({status[1] if status else ''} {code[1]})"
    if isinstance(error, FileNotFoundError) and error.errno is None:  # the answer to HEAD has no text
        return "no such object"
    cause = re.search(r'message: "([^"]+)"|(TimedOut|dns error)', details)
    text = re.sub(r"https?://([^/\s?]*)\S*", r"\1", " ".join(text.split())).rstrip(". :")
    text = re.sub(r"Generic \w+ error: |Error performing \w+ request: |, max_retries: \d+, retry_\w+: \S+", "", text)
    return f"{text}{f' ({cause[1] or cause[2]})' if cause else ''}"


def main(uri: str, file: str) -> int:
    """Downloads an object, for processes that can't, as they were forked; returns the exit code."""
    folder, _, name = uri.rpartition("/")
    try:
        CloudFolder(folder).download(name, Path(file))
    except StorageError as error:
        print(error, file=sys.stderr)
        return TRY_AGAIN if OUTAGE.search(str(error)) else USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
