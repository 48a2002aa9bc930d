"""What a conversion will do, settled before it starts: the source, its parts, and what is made of each image.

Plans are equal exactly where their results are, byte for byte. So an interrupted conversion resumes only under the plan
that it began with, which is stored beside its parts.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from convert.sources.parts import SourcePlan

PLAN_NAME = "plan.json"
# Keys that a source gets after the first checks.
LATE = ("device", "encode_dtype", "files", "vae_digest", "vae_commit", "teacher_digest")
FILES_NAMED = 1000  # of more files, a plan keeps only their number, bytes and digest


@dataclass(frozen=True)
class Plan:
    """A conversion's plan."""

    source: dict[str, Any]  # as in `spec.json`: the options given, and ``files``, the identity of the files
    reading: SourcePlan
    names: list[str] | None = None  # of the classes, if `--class-names` gives them

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


def digest(content: Any) -> str:
    """A hash of JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def changes(there: dict[str, Any], now: dict[str, Any]) -> str:
    """The differences between two plans' ``source``, in words; "" if there are none."""
    return "; ".join(
        "the source's files have changed" if key == "files" else f"{key} {there.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted({*there, *now})
        if there.get(key) != now.get(key) and key != "class_ids"  # these follow from class_names and files
    )


def changed_file(there: list[dict[str, Any]] | None, now: list[dict[str, Any]]) -> str:
    """The first file that has changed, for an error; "" where that isn't known."""
    before, after = ({file["name"]: file for file in files} for files in (there or now, now))
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            change = "is new" if name not in before else "is gone" if name not in after else "has changed"
            return f": {name} {change}"
    return ""
