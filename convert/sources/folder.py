"""Folders of images. A plan's files are folders here, and a part may continue in the next folder."""

import hashlib
import os
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convert.sources.names import SPLIT, check_same, class_name, class_names, when
from convert.sources.parts import InputError, Part, Sample, SourcePlan, cut, cut_off
from sit_composer.data.folders import Listing, scan
from sit_composer.data.image_files import images_below, images_of


def plan_source(description: dict[str, Any], limit: int | None) -> SourcePlan:
    """Lists ROOT/CLASS/IMAGE, also in folders inside a class, with classes in `class_names`' order; or all images below
    ROOT, unlabelled."""
    root, labelled, left_out = description["path"], "label_column" not in description, Counter[str]()
    with _reading(root):
        found = _classes(root, left_out) if labelled else images_below(root, left_out)
        listed = [_state(folder, images)[1] for folder, images in found]
    if not any(folder["pictures"] for folder in listed):
        expected = "ROOT/CLASS/IMAGE; for images without classes use --label-column none" if labelled else "image"
        raise InputError(f"{root}: holds no {expected}")
    classes = class_names(map(_class, listed), root) if labelled else ["all"]
    return SourcePlan(listed, classes, cut_off(_across(listed), limit), dict(left_out))


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
    labels = {name: label for label, name in enumerate(plan.classes)}
    for folder, names in _folders(description, plan, part):
        for name in names:
            path = Path(folder["name"], name)
            yield Sample(str(path), path, 0 if "label_column" in description else labels[_class(folder)])


def check_part(description: dict[str, Any], plan: SourcePlan, part: Part) -> None:
    """Checks, after a part's images have been read, that its folders have not changed."""
    deque(_folders(description, plan, part), maxlen=0)


def _folders(description: dict[str, Any], plan: SourcePlan, part: Part) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """A part's folders, each with the names of its images in that folder."""
    begin, left, ignored = part.start, part.rows, Counter[str]()
    for folder in plan.files[part.file :]:
        if not left:
            break
        with _reading(folder["name"]):
            if "label_column" in description:
                images = images_of(scan(folder["name"], ignored)[1], ignored)
            else:
                listings = images_below(folder["name"], ignored, description["path"])
                images = [image for _, images in listings for image in images]
            names, now = _state(folder["name"], images)
        check_same(folder, now)
        yield folder, names[begin : begin + left]
        left -= min(left, len(names) - begin)
        begin = 0


def _class(folder: dict[str, Any]) -> str:
    return class_name(os.path.basename(folder["name"]))


def _classes(root: str, left_out: Counter[str]) -> Iterator[Listing]:
    """The folders in a root, each with all images below it."""
    folders, files = scan(root, left_out)
    if beside := len(images_of(files, left_out)):
        left_out["an image beside the classes' folders"] += beside
    for folder in folders:
        listings = list(images_below(folder, left_out, root))
        inside = [inner for inner, images in listings if images]
        if inside and folder not in inside and (len(folders) == 1 or SPLIT.search(f"{os.path.basename(folder)}/")):
            expected = f"expected ROOT/CLASS/IMAGE; perhaps {folder} is the source"
            raise InputError(f"{inside[0]}: is a folder inside a class, {expected}")
        if listings:
            yield folder, [image for _, images in listings for image in images]


def _state(folder: str, images: list[os.DirEntry[str]]) -> tuple[list[str], dict[str, Any]]:
    """The names of a folder's images, sorted, and the state of the folder."""
    found = sorted((image.path.removeprefix(os.path.join(folder, "")), *_bytes(image)) for image in images)
    modified = when(max((ns for _, _, ns in found), default=0))
    digest = hashlib.blake2b(repr(found).encode(), digest_size=8).hexdigest()
    state: dict[str, Any] = {"name": folder, "bytes": sum(size for _, size, _ in found), "modified": modified}
    return [name for name, _, _ in found], state | {"pictures": len(found), "digest": digest}


def _bytes(entry: os.DirEntry[str]) -> tuple[int, int]:
    """An entry's bytes, and when it was modified; 0 for a broken link, which is reported when it is read."""
    try:
        state = entry.stat()
    except FileNotFoundError:
        return 0, 0
    return state.st_size, state.st_mtime_ns


@contextmanager
def _reading(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or folder}: cannot be read: {error.strerror}") from error
