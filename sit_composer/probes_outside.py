"""The doctor's checks of what a run writes to and reads from: disks, object stores and the Hub."""

import os
import shutil
import tempfile
import time
import urllib.request
import uuid
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from urllib.error import HTTPError

import boto3
from huggingface_hub import HfApi, try_to_load_from_cache

from sit_composer.cli import is_hub_name, is_remote, s3_endpoint
from sit_composer.config.ranks import save_folder
from sit_composer.config.schema import Config
from sit_composer.costs.estimate import checkpoint_bytes
from sit_composer.doctor import GIB, Finding, Make, sections
from sit_composer.errors import one_line
from sit_composer.storage import StorageError, open_run_folder

SPACE = "free some space or make it writable, or choose another folder"
WRITTEN = 2**26  # bytes that a disk's check writes
PROBE = ".sit_composer-doctor-"
SKEW, REFUSED_SKEW = 60, 840  # seconds: nodes' logs can't be compared; S3 refuses requests that are off by 900
CLOCK = "set the clock by NTP (timedatectl set-ntp true)"
ENDPOINT = "S3_ENDPOINT_URL must name the store, and no firewall or proxy may be between"
UNREACHED = "the store is not reached, or refuses this clock"
SAVE = "it needs a bucket, and credentials that may list, write, read and delete (s3:ListBucket, PutObject, …) there"


def check_run(make: Make, config: Config) -> None:
    """Makes the checks of the folders, the store and the Hub's repositories that a config names."""
    remote = {name: data for name, data in sections(config).items() if data.remote}
    for name, data in remote.items():
        make(f"disk {name}.local", partial(disk, data.local), SPACE)
    saved = save_folder(config) if config.trainer.get("save_folder") else ""
    if saved:
        made = tempfile.gettempdir() if is_remote(saved) else saved  # where a checkpoint is made
        make("disk of checkpoints", lambda: disk(made, checkpoint_bytes(config), config.supervision.grace), SPACE)
    uses_s3 = any(uri.startswith("s3://") for uri in (saved, *(data.remote for data in remote.values())))
    reached = not uses_s3 or make("S3 clock", clock, ENDPOINT) != "failed"
    if is_remote(saved):
        tried = reached or not saved.startswith("s3://")
        make("trainer.save_folder", lambda: written(saved) if tried else ("not checked", UNREACHED), SAVE)
    for name, repository in hub_names(config).items():
        make(name, partial(hub, repository), "set HF_TOKEN, and HF_HOME")


def disk(path: str, checkpoint: int = 0, grace: float = 0) -> Finding:
    """Free space where a folder is or will be, and a real write. It leaves nothing, also if it is killed.

    ``checkpoint``: bytes of a checkpoint that is saved there, within ``grace`` seconds of a SIGTERM.
    """
    above = next(p for p in (Path(path).absolute(), *Path(path).absolute().parents) if p.exists())
    if not above.is_dir():
        return "failed", f"{above} is a file, expected a folder", "delete it, or choose another folder"
    free = shutil.disk_usage(above).free
    content = os.urandom(max(1, min(WRITTEN, free // 4)))
    started = time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=above, buffering=0) as file:
            file.write(content)
            os.fsync(file.fileno())
    except OSError as error:
        return "failed", f"{above}: {error.strerror}", SPACE
    speed = len(content) / (time.perf_counter() - started)
    text = f"{free / GIB:.3g} GiB free in {above}, {speed / 1e6:,.0f} MB/s written and synced"
    text += f"; a checkpoint has {checkpoint / 1e9:.3g} GB" if checkpoint else ""
    if free < (2 * checkpoint or GIB):  # the new one is written before an old one is deleted
        return "failed" if free < checkpoint else "warning", text, "free some space, or choose another folder"
    if checkpoint and checkpoint / speed > grace:
        advice = f"raise supervision.grace, {grace:g} s, and what the scheduler allows, or take a faster disk"
        return "warning", f"{text}, which takes {checkpoint / speed:.0f} s", advice
    return "ok", text


def clock() -> Finding:
    """This machine's clock against the Date header of the S3 store, which any answer has."""
    url, before = s3_endpoint() or boto3.Session().client("s3").meta.endpoint_url, time.time()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10) as answer:
            headers = answer.headers
    except HTTPError as error:  # as without credentials
        headers = error.headers
    except OSError as error:
        return "failed", f"{url}: {one_line(getattr(error, 'reason', error))}", ENDPOINT
    if "Date" not in headers:
        return "not checked", f"{url} answers without a Date"
    ahead = (before + time.time()) / 2 - parsedate_to_datetime(headers["Date"]).timestamp()
    text = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} {url}"
    if abs(ahead) > REFUSED_SKEW:
        return "failed", f"{text}, which refuses requests at 900 s", CLOCK
    return ("warning", text, CLOCK) if abs(ahead) > SKEW else ("ok", text)


def written(uri: str) -> Finding:
    """Writes, reads, lists and deletes objects in a folder of its own below ``uri``."""
    folder = open_run_folder(f"{uri.rstrip('/')}/{PROBE}{uuid.uuid4().hex}")
    step, names, started = "list", ["object", "lease"], time.perf_counter()
    try:
        folder.listing()  # first: in some stores, a write to a missing bucket creates it
        step = "write"
        folder.write("object", b"1")
        try:
            made = [folder.replace("lease", *change) for change in ((None, b"1"), (None, b"2"), (b"1", b"3"))]
            step = "read"
            content = folder.read("object")
            step = "list"
            listing = folder.listing()
        finally:
            stopped_at, step = step, "delete"
            folder.delete(names)
            step = stopped_at
        left = folder.listing()
    except StorageError as error:
        kept = f"; {folder.uri} stays there" if step == "delete" else ""
        return "failed", f"{step}: {error}{kept}", SAVE
    if content != b"1" or listing != dict.fromkeys(names, 1) or left:
        text = f"read {content!r}, listed {listing}, and {left} after deleting"
        return "failed", text, "the store isn't consistent"
    if made != [True, False, True]:
        why = "has no conditional writes: of two runs that start together, both may write for some seconds"
        return "warning", f"{uri}: the store {why}", "start one at a time, or take a store that has them"
    took = time.perf_counter() - started
    return "ok", f"wrote (conditionally, too), read, listed and deleted in {uri} in {took:.2g} s"


def hub_names(config: Config) -> dict[str, str]:
    """The Hub's repositories that a run loads from, by key."""
    library, _, model = (getattr(config.alignment, "teacher", None) or "").partition(":")
    teacher = f"timm/{model}" if library == "timm" and "/" not in model and not os.path.isdir(model) else model
    names = {"autoencoder.name": config.autoencoder.name or "", "alignment.teacher": teacher}
    return {key: name for key, name in names.items() if is_hub_name(name)}


def hub(name: str) -> Finding:
    """Whether a repository of the Hub may be read, or is in the cache."""
    files = ("config.json", "vae/config.json")
    cached = any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
    try:
        HfApi().auth_check(name)
    except Exception as error:  # huggingface_hub's and its HTTP library's
        text = f"{name}: {type(error).__name__}: {one_line(error)}"
        advice = "accept its licence and set HF_TOKEN, or copy it here and give the folder"
        return ("ok", f"{name} is in the cache; the Hub can't be asked") if cached else ("failed", text, advice)
    return "ok", f"{name} may be read{' and is in the cache' if cached else ''}"
