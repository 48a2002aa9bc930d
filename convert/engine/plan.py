"""What a conversion will do, settled before it starts: the source, its parts, and what is made of each image.

Plans are equal exactly where their results are, byte for byte. So an interrupted conversion resumes only under the plan
that it began with, which is stored beside its parts.
"""

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convert.sources.parts import InputError, SourcePlan

PLAN_NAME = "plan.json"
LATE = ("device", "encode_dtype", "files", "vae_digest", "vae_commit")  # keys that a source gets after the first checks
FILES_NAMED = 1000  # of more files, a plan keeps only their number, bytes and digest


@dataclass(frozen=True)
class Plan:
    """A conversion's plan."""

    source: dict[str, Any]  # as in `spec.json`: the options given, and ``files``, the identity of the files
    reading: SourcePlan

    @property
    def rows(self) -> int | None:
        """The images in the source; None where counting would mean reading."""
        rows = [part.rows for part in self.reading.parts]
        return None if None in rows else sum(rows)

    def record(self) -> dict[str, Any]:
        """The content of `plan.json`, by which an equal plan is recognized, and differences are named."""
        files = self.reading.files
        return {
            "source": self.source,
            "classes": self.reading.classes if len(self.reading.classes or []) <= FILES_NAMED else None,
            "files": files if len(files) <= FILES_NAMED else None,
            "digest": digest([self.source, self.reading.classes, [asdict(part) for part in self.reading.parts]]),
        }


def identity(files: list[dict[str, Any]]) -> dict[str, Any]:
    """The identity of files: their number, their bytes, and a digest of their names, sizes and times."""
    sizes = [file.get("bytes") for file in files]
    return {"count": len(files), "bytes": None if None in sizes else sum(sizes), "digest": digest(files)}


def vae_identity(vae: str) -> dict[str, str]:
    """The identity of an autoencoder, as its name may later mean another one: a folder's digest, or a commit."""
    if os.path.isdir(vae):
        hashes = []
        for path in sorted(path for path in Path(vae).rglob("*") if path.suffix in (".json", ".safetensors")):
            with open(path, "rb") as opened:
                hashes.append([str(path.relative_to(vae)), hashlib.file_digest(opened, "sha256").hexdigest()])
        return {"vae_digest": digest(hashes)}
    from huggingface_hub import errors, hf_hub_download  # only --latents needs it

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it logs each of five attempts to reach the Hub
    reached = True
    for file in ("config.json", "vae/config.json"):  # an autoencoder's, or a pipeline's
        try:
            found = hf_hub_download(vae, file, local_files_only=not reached)  # .../snapshots/COMMIT/config.json
            return {"vae_commit": Path(found).parents[file.count("/")].name}
        except errors.LocalEntryNotFoundError:
            reached = False
        except Exception:  # reported when the autoencoder is loaded
            continue
    if not reached:
        raise InputError(f"--vae: {vae!r} is not a folder here, and the Hub, which may have it, can't be reached")
    return {}


def digest(content: Any) -> str:
    """A hash of JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def changes(there: dict[str, Any], now: dict[str, Any]) -> str:
    """The differences between two plans' ``source``, in words; "" if there are none."""
    return "; ".join(
        "the source's files have changed" if key == "files" else f"{key} {there.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted({*there, *now})
        if there.get(key) != now.get(key)
    )


def changed_file(there: list[dict[str, Any]] | None, now: list[dict[str, Any]]) -> str:
    """The first file that has changed, for an error; "" where that isn't known."""
    before, after = ({file["name"]: file for file in files} for files in (there or now, now))
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            change = "is new" if name not in before else "is gone" if name not in after else "has changed"
            return f": {name} {change}"
    return ""
