"""What a conversion will do, settled before it does any of it: the source, its parts, and what is made of a picture.

Plans are equal exactly where their results are, byte for byte. So a conversion that was stopped goes on only under the
plan that it began with, which lies beside its parts.
"""

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convert.sources.registry import InputError, SourcePlan

PLAN_NAME = "plan.json"
LATE = ("files", "vae_digest", "vae_commit")  # what a source has only when it has been looked into
FILES_NAMED = 1000  # of more files, a plan keeps only what they are together


@dataclass(frozen=True)
class Plan:
    """A conversion's plan.

    Args:
        source: where pictures come from and what is made of them, as `spec.json` will tell: the options' names and
            values, and ``files``, the identity of the files that are read.
        reading: the source's parts, files and classes.
    """

    source: dict[str, Any]
    reading: SourcePlan

    @property
    def rows(self) -> int | None:
        """The pictures in the source; None where counting would mean reading."""
        rows = [part.rows for part in self.reading.parts]
        return None if None in rows else sum(rows)

    def record(self) -> dict[str, Any]:
        """What `plan.json` holds: enough to know an equal plan, and to tell what is different in another."""
        files = self.reading.files
        return {
            "source": self.source,
            "classes": self.reading.classes if len(self.reading.classes or []) <= FILES_NAMED else None,
            "files": files if len(files) <= FILES_NAMED else None,
            "digest": digest([self.source, self.reading.classes, [asdict(part) for part in self.reading.parts]]),
        }


def identity(files: list[dict[str, Any]]) -> dict[str, Any]:
    """The identity of files: how many they are, their bytes, and a digest of their names, sizes and times."""
    sizes = [file.get("bytes") for file in files]
    return {"count": len(files), "bytes": None if None in sizes else sum(sizes), "digest": digest(files)}


def vae_identity(vae: str) -> dict[str, str]:
    """What tells an autoencoder from another that may come to lie under its name: a folder's digest, or a commit.

    Raises:
        InputError: if it is no folder, and not in the Hub's cache, and the Hub can't be asked.
    """
    if os.path.isdir(vae):
        return {"vae_digest": folder_digest(vae)}
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it logs each of five tries to reach the Hub
    reached = True
    for file in ("config.json", "vae/config.json"):  # an autoencoder's, or a pipeline's
        try:
            path = hf_hub_download(vae, file, local_files_only=not reached)  # .../snapshots/COMMIT/config.json
            return {"vae_commit": Path(path).parents[file.count("/")].name}
        except LocalEntryNotFoundError:
            reached = False
        except Exception:  # loading it will tell what is wrong
            continue
    if not reached:
        raise InputError(f"--vae: {vae!r} is no folder here, and the Hub, which may have it, can't be reached")
    return {}


def folder_digest(folder: str) -> str:
    """A digest of the names and the contents of an autoencoder's files."""
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix in (".json", ".safetensors"))
    hashes = []
    for file in files:
        with open(file, "rb") as opened:
            hashes.append([str(file.relative_to(folder)), hashlib.file_digest(opened, "sha256").hexdigest()])
    return digest(hashes)


def digest(content: Any) -> str:
    """A hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def changes(there: dict[str, Any], now: dict[str, Any]) -> str:
    """What is different in two plans' ``source``, in words; empty if nothing is."""
    return "; ".join(
        _files_change(there.get(key), now.get(key))
        if key == "files"
        else f"{key} {there.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted({*there, *now})
        if there.get(key) != now.get(key)
    )


def _files_change(there: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    """Of two `identity`s."""
    same = there and now and (there["count"], there["bytes"]) == (now["count"], now["bytes"])
    return "the source's files have changed" + (": not in size, but in name or time" if same else "")


def changed_file(there: list[dict[str, Any]] | None, now: list[dict[str, Any]]) -> str:
    """The first file that is not as it was, for an error; empty where that isn't known."""
    if there is None:
        return ""
    before, after = ({file["name"]: file for file in files} for files in (there, now))
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            what = "is new" if name not in before else "is gone" if name not in after else "is another"
            return f": {name} {what}"
    return ""
