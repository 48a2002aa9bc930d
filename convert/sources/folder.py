"""Folders of images. A plan's files are folders here, and a part may continue in the next folder."""

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.sources.names import check_same, format_of, when
from convert.sources.parts import InputError, Part, Sample, SourcePlan, cut, cut_off


def plan_source(description: dict[str, Any], limit: int | None) -> SourcePlan:
    """Lists ROOT/CLASS/IMAGE, with classes in the order of their names; or all images below ROOT, unlabelled."""
    root = Path(description["path"])
    labelled = "label_column" not in description
    folders = sorted(f for f in root.iterdir() if f.is_dir() and f.name[0] != ".") if labelled else list(_below(root))
    classes = [folder.name for folder in folders] if labelled else ["all"]
    listed = [_list(folder, labelled)[1] for folder in folders]
    if not any(folder["pictures"] for folder in listed):
        expected = "ROOT/CLASS/IMAGE; for images without classes use --label-column none" if labelled else "image"
        raise InputError(f"{root}: holds no {expected}")
    return SourcePlan(listed, classes, cut_off(_across(listed), limit))


def _across(folders: list[dict[str, Any]]) -> list[Part]:
    """Parts as if all folders were one; each part is then counted from the folder in which it begins."""
    parts, file, before = [], 0, 0
    for part in cut(0, [1] * sum(folder["pictures"] for folder in folders)):
        while part.start >= before + folders[file]["pictures"]:
            before += folders[file]["pictures"]
            file += 1
        parts.append(Part(file, part.start - before, part.stop - before, part.rows))
    return parts


def read_part(description: dict[str, Any], plan: SourcePlan, part: Part) -> Iterator[Sample]:
    """The images of a part, as paths. Each folder is compared with the plan first."""
    labelled = "label_column" not in description
    for file, names in _folders(description, plan, part):
        folder = Path(plan.files[file]["name"])
        for name in names:
            yield Sample(str(folder / name), folder / name, file if labelled else 0)


def check_part(description: dict[str, Any], plan: SourcePlan, part: Part) -> None:
    """Checks, after a part's images have been read, that its folders have not changed."""
    deque(_folders(description, plan, part), maxlen=0)


def _folders(description: dict[str, Any], plan: SourcePlan, part: Part) -> Iterator[tuple[int, list[str]]]:
    """The numbers of a part's folders, each with the names of its images in that folder."""
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
    """All folders below one, in the order of their names, each after those inside it; without hidden ones."""
    with os.scandir(folder) as entries:
        inside = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False) and not e.name.startswith("."))
    for name in inside:
        yield from _below(folder / name)
    yield folder


def _list(folder: Path, of_class: bool) -> tuple[list[str], dict[str, Any]]:
    """The names of a folder's images, sorted, and the state of the folder."""
    images = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if of_class and entry.is_dir():
                    raise InputError(f"{entry.path}: is a folder inside a class, expected ROOT/CLASS/IMAGE")
                if format_of(entry.name) == "imagefolder":
                    images.append((entry.name, *_state(entry)))
    except OSError as error:
        raise InputError(f"{error.filename or folder}: cannot be read: {error.strerror}") from error
    images.sort()
    modified = when(max((ns for _, _, ns in images), default=0))
    digest = hashlib.blake2b(repr(images).encode(), digest_size=8).hexdigest()
    state: dict[str, Any] = {"name": str(folder), "bytes": sum(size for _, size, _ in images), "modified": modified}
    return [name for name, _, _ in images], state | {"pictures": len(images), "digest": digest}


def _state(entry: os.DirEntry[str]) -> tuple[int, int]:
    """An entry's bytes, and when it was modified; 0 for a broken link, which is reported when it is read."""
    try:
        state = entry.stat()
    except FileNotFoundError:
        return 0, 0
    return state.st_size, state.st_mtime_ns
