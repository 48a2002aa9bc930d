"""Folders of pictures, and scikit-learn's digits.

A plan's files are folders here: a million pictures need not be named one by one. A part is some pictures of a folder
and, where those end, of the folders after it.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.sources.names import check_same, format_of, when
from convert.sources.parts import InputError, Part, Sample, SourcePlan, cut, cut_off


def plan_folder(description: dict[str, Any], limit: int | None) -> SourcePlan:
    """Lists ROOT/CLASS/PICTURE, with classes in the order of their names; or all pictures below ROOT, unlabelled.

    Raises:
        InputError: if there are no pictures, or folders inside a class.
    """
    root = Path(description["path"])
    if "label_column" in description:
        folders, classes = list(_below(root)), ["all"]
    else:
        with os.scandir(root) as entries:
            folders = sorted(Path(e.path) for e in entries if e.is_dir() and not e.name.startswith("."))
        classes = [folder.name for folder in folders]
    listed = [_list(folder, "label_column" not in description)[1] for folder in folders]
    if not any(folder["pictures"] for folder in listed):
        if "label_column" in description:
            raise InputError(f"{root} holds no picture")
        raise InputError(f"{root} holds no ROOT/CLASS/PICTURE; for pictures without classes say --label-column none")
    return SourcePlan(listed, classes, cut_off(_across(listed), limit))


def _across(folders: list[dict[str, Any]]) -> list[Part]:
    """Parts as if all folders were one; each is then counted from the folder in which it begins."""
    parts, file, before = [], 0, 0
    for part in cut(0, [1] * sum(folder["pictures"] for folder in folders)):
        while part.start >= before + folders[file]["pictures"]:
            before += folders[file]["pictures"]
            file += 1
        parts.append(Part(file, part.start - before, part.stop - before, part.rows))
    return parts


def read_folder(description: dict[str, Any], plan: SourcePlan, part: Part) -> Iterator[Sample]:
    """The pictures of a part, as paths. The folders that they lie in are compared with the plan first.

    Raises:
        InputError: if one has changed.
    """
    labelled = "label_column" not in description
    for file, names in _folders(description, plan, part):
        folder = Path(plan.files[file]["name"])
        for name in names:
            yield Sample(str(folder / name), folder / name, file if labelled else 0)


def check_folder(description: dict[str, Any], plan: SourcePlan, part: Part) -> None:
    """Looks again, when a part's pictures have been read, whether its folders have changed.

    Raises:
        InputError: if one has.
    """
    for _ in _folders(description, plan, part):
        pass


def _folders(description: dict[str, Any], plan: SourcePlan, part: Part) -> Iterator[tuple[int, list[str]]]:
    """A part's folders, by their numbers, with its pictures in them."""
    begin, left = part.start, part.rows
    for file in range(part.file, len(plan.files)):
        if not left:
            break
        names, now = _list(Path(plan.files[file]["name"]), "label_column" not in description)
        check_same(plan.files[file], now)
        yield file, names[begin : begin + left]
        left -= min(left, len(names) - begin)
        begin = 0


def _below(folder: Path) -> Iterator[Path]:
    """All folders below one, in the order of their names, each after those inside it; but for hidden ones."""
    with os.scandir(folder) as entries:
        inside = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False) and not e.name.startswith("."))
    for name in inside:
        yield from _below(folder / name)
    yield folder


def _list(folder: Path, of_class: bool) -> tuple[list[str], dict[str, Any]]:
    """A folder's pictures in the order of their names, and what identifies them."""
    pictures = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if of_class and entry.is_dir():
                    raise InputError(
                        f"{entry.path} is a folder inside a class: give the folder whose own folders hold the pictures"
                    )
                if format_of(entry.name) == "imagefolder":
                    pictures.append((entry.name, *_state(entry)))
    except OSError as error:
        raise InputError(f"cannot read {error.filename or folder}: {error.strerror}") from error
    pictures.sort()
    modified = when(max((ns for _, _, ns in pictures), default=0))
    digest = hashlib.blake2b(repr(pictures).encode(), digest_size=8).hexdigest()
    state = {"name": str(folder), "bytes": sum(size for _, size, _ in pictures), "modified": modified}
    return [name for name, _, _ in pictures], state | {"pictures": len(pictures), "digest": digest}


def _state(entry: os.DirEntry[str]) -> tuple[int, int]:
    """Its bytes and when it was modified; that of a link to nowhere will turn out when it is read."""
    try:
        state = entry.stat()
    except FileNotFoundError:
        return 0, 0
    return state.st_size, state.st_mtime_ns
