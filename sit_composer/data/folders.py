"""What is in folders, links followed; and what is left out, counted by reason. Only the standard library."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

HIDDEN = "hidden, its name begins with a dot"
ARCHIVER = "__MACOSX"  # a folder that macOS's archiver puts beside what it packs
AGAIN = "a folder that a link reaches again"
Listing = tuple[str, list[os.DirEntry[str]]]  # a folder and its files


def scan(folder: str, left_out: Counter[str]) -> tuple[list[str], list[os.DirEntry[str]]]:
    """The folders' paths and the files in a folder, each sorted by name. Hidden ones are left out."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith(".") or entry.name == ARCHIVER:
                left_out[ARCHIVER if entry.name == ARCHIVER else HIDDEN] += 1
            elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                folders.append(entry.path)
            else:
                files.append(entry)
    return folders, files


def below(folder: str, left_out: Counter[str], root: str | None = None) -> Iterator[Listing]:
    """Each folder below one, and at last that one, with its files. A folder is left out if a link reaches it again, or
    leads up from this folder or from the ``root`` around it."""
    above = [] if root is None else [Path(os.path.realpath(root), "folder")]
    return _below(folder, left_out, {p for path in (Path(os.path.realpath(folder)), *above) for p in path.parents})


def _below(folder: str, left_out: Counter[str], seen: set[Path]) -> Iterator[Listing]:
    real = Path(os.path.realpath(folder))
    if real in seen:
        left_out[AGAIN] += 1
        return
    seen.add(real)
    folders, files = scan(folder, left_out)
    for inside in folders:
        yield from _below(inside, left_out, seen)
    yield folder, files


def suffix_of(path: str) -> str:
    """A file's extension in lower case, with its dot."""
    return os.path.splitext(path)[1].lower()


def kind_of(path: str) -> str:
    """A file's extension, for a count of few kinds."""
    suffix = suffix_of(path)
    return "no extension" if not suffix else suffix if re.fullmatch(r"\.[a-z]\w{0,9}", suffix) else "another extension"


def in_words(counts: Mapping[str, int]) -> str:
    """Counts by reason, the most frequent first."""
    return "; ".join(f"{reason}: {n}" for reason, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
