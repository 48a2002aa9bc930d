"""Checks of what is elsewhere: object stores, their clock, and the Hugging Face Hub. Credentials are never printed."""

import os
import time
import urllib.request
import uuid
from email.utils import parsedate_to_datetime
from urllib.error import HTTPError, URLError

import boto3
from huggingface_hub import HfApi, try_to_load_from_cache

from sit_composer.checkup.finding import Finding, Make, failed, not_checked, ok, warning
from sit_composer.cli import CREDENTIALS, is_hub_name, is_remote, s3_endpoint
from sit_composer.config.ranks import save_folder
from sit_composer.config.schema import Config
from sit_composer.data.spec import INDEX_NAME
from sit_composer.errors import one_line
from sit_composer.storage import StorageError, open_run_folder

PROBE = ".sit_composer-doctor-"
CONNECT = 10.0  # seconds to reach a store
SKEW, REFUSED_SKEW = 60, 840  # seconds: nodes' logs can't be compared; S3 refuses requests that are off by 900
CLOCK = "set the clock by NTP (timedatectl set-ntp true)"
ENDPOINT = "S3_ENDPOINT_URL must name the store, and no firewall or proxy may be between"
SAVE = "trainer.save_folder needs a bucket, and credentials that may list, read, write and delete objects in it"
STEPS = {  # of the check of a folder: what credentials must be allowed there, in AWS's words
    "list": "s3:ListBucket", "write": "s3:PutObject", "read": "s3:GetObject", "delete": "s3:DeleteObject",
}  # fmt: skip


def check_stores(make: Make, config: Config) -> None:
    """Makes the checks of the stores and of the Hub's repositories that a config names."""
    folder = save_folder(config) if config.trainer.get("save_folder") else ""
    saved = {"trainer.save_folder": folder} if is_remote(folder) else {}
    sections = {name: getattr(config, name) for name in ("data", "eval_data")}
    read = {f"{name}.remote": data.remote for name, data in sections.items() if data is not None and data.remote}
    reached = True
    if any(uri.startswith("s3://") for uri in (*saved.values(), *read.values())):
        make("S3 credentials", 20, credentials, CREDENTIALS)
        reached = make("S3 clock", 2 * CONNECT, lambda: clock(s3_url()), ENDPOINT).status != "failed"
    for checks, advice, check in ((saved, SAVE, written), (read, "convert/to_mds.py makes shards there", index)):
        for name, uri in checks.items():
            if uri.startswith("s3://") and not reached:
                make(name, 1, lambda: not_checked("the store is not reached, or refuses this clock"), "")
            else:
                make(name, 60, lambda check=check, uri=uri: check(uri), advice)  # type: ignore[misc]
    for name, repository in hub_names(config).items():
        make(name, 30, lambda repository=repository: hub(repository), "set HF_TOKEN, and HF_HOME")  # type: ignore[misc]


def credentials() -> Finding:
    """Where S3's credentials come from."""
    found = boto3.Session().get_credentials()
    where = s3_endpoint() or "AWS"
    if found is None:
        return failed(f"none found, for {where}", CREDENTIALS)
    return ok(f"found by {found.method}, for {where}")


def s3_url() -> str:
    """The address of the S3 store."""
    return s3_endpoint() or boto3.Session().client("s3").meta.endpoint_url


def clock(url: str) -> Finding:
    """This machine's clock against the Date header of a store, which any answer has."""
    before = time.time()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=CONNECT) as answer:
            headers = answer.headers
    except HTTPError as error:  # as without credentials
        headers = error.headers
    except (URLError, OSError) as error:
        return failed(f"{url}: {one_line(getattr(error, 'reason', error))}", ENDPOINT)
    if "Date" not in headers:
        return not_checked(f"{url} answers without a Date")
    ahead = (before + time.time()) / 2 - parsedate_to_datetime(headers["Date"]).timestamp()
    text = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} {url}"
    if abs(ahead) > REFUSED_SKEW:
        return failed(f"{text}, which refuses requests at 900 s", CLOCK)
    return warning(text, CLOCK) if abs(ahead) > SKEW else ok(text)


def written(uri: str) -> Finding:
    """Writes, reads, lists and deletes objects in a folder of its own below ``uri``."""
    folder = open_run_folder(f"{uri.rstrip('/')}/{PROBE}{uuid.uuid4().hex}")
    step, names = "list", ["object", "lease"]
    started = time.perf_counter()
    try:
        folder.listing()  # first: in some stores, a write to a missing bucket creates it
        step = "write"
        folder.write("object", b"1")
        try:
            made = [folder.replace("lease", None, content) for content in (b"1", b"2")]
            changed = folder.replace("lease", b"1", b"3")
            step = "read"
            content = folder.read("object")
            step = "list"
            listing = folder.listing()
        finally:
            stopped_at, step = step, "delete"
            folder.delete(names)
            step = stopped_at
        step = "list"
        left = folder.listing()
    except StorageError as error:
        kept = f"; {folder.uri} stays there" if step == "delete" else ""
        right = f"need {STEPS[step]} on an existing bucket" if uri.startswith("s3://") else f"must be allowed to {step}"
        return failed(f"{step}: {error}{kept}", f"the credentials {right}")
    took = time.perf_counter() - started
    if content != b"1" or listing != dict.fromkeys(names, 1) or left:
        return failed(f"read {content!r}, listed {listing}, and {left} after deleting", "the store isn't consistent")
    if made != [True, False] or not changed:
        why = "has no conditional writes: of two runs that start together, both may write for some seconds"
        return warning(f"{uri}: the store {why}", "start one at a time, or take a store that has them")
    return ok(f"wrote (conditionally, too), read, listed and deleted in {uri} in {took:.2g} s")


def index(uri: str) -> Finding:
    """Reads the index of the shards, and nothing else: `--dry-run` reads a sample."""
    if not uri.startswith(("s3://", "az://", "abfs://")):  # by which streaming's own client isn't tried
        return not_checked("--dry-run reads from it")
    folder = open_run_folder(uri)
    content = folder.read(INDEX_NAME)
    if content is None:
        return failed(f"{uri}: no {INDEX_NAME}", "convert/to_mds.py makes shards there")
    return ok(f"read {INDEX_NAME}, {len(content)} bytes, in {folder.uri}")


def hub_names(config: Config) -> dict[str, str]:
    """The Hub's repositories that a run loads from, by key."""
    found = {}
    if config.autoencoder.name is not None and is_hub_name(config.autoencoder.name):
        found["autoencoder.name"] = config.autoencoder.name
    if config.alignment is not None and config.alignment.teacher is not None:
        library, _, model = config.alignment.teacher.partition(":")
        name = f"timm/{model}" if library == "timm" and "/" not in model else model
        if not os.path.isdir(model) and is_hub_name(name):
            found["alignment.teacher"] = name
    return found


def hub(name: str) -> Finding:
    """Whether a repository of the Hub may be read, or is in the cache."""
    files = ("config.json", "vae/config.json")
    cached = any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
    try:
        HfApi().auth_check(name)
    except Exception as error:  # huggingface_hub's and its HTTP library's
        if cached:
            return ok(f"{name} is in the cache; the Hub can't be asked: {one_line(error)}")
        advice = "accept its licence and set HF_TOKEN, or copy it here and give the folder"
        return failed(f"{name}: {type(error).__name__}: {one_line(error)}", advice)
    return ok(f"{name} may be read{' and is in the cache' if cached else ''}")
