"""WebDataset tars: consecutive members whose file names agree up to the first dot are one sample. The extension says
what a member is: an image (jpg, png, …; or none), its label (cls: an integer or a name), or a description (json)."""

import io
import json
import re
import tarfile
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

from convert.sources import s3
from convert.sources.files import check_unchanged, fingerprint, list_files
from convert.sources.names import SCHEME, WHOLE, class_name, class_names, label_text
from convert.sources.parts import MAX_CLASSES, InputError, Part, Sample, SourcePlan, cut_off
from sit_composer.data.folders import HIDDEN
from sit_composer.data.image_files import opens, suffixes

IMAGES = {"", *(suffix.removeprefix(".") for suffix in suffixes())}
NAME = re.compile(r"((?:.*/)?[^./]+)(?:\.([^/]+))?", re.DOTALL)
MAX_BYTES = 1 << 28  # of the member of an image or a label
Group = dict[str, bytes | None]  # the bytes of a sample's members by extension; None: not wanted
Found = tuple[str, Any, str | None, tuple[str, ...]]  # where a sample is, its image, its label, what is left out before


def plan_source(description: dict[str, Any], limit: int | None) -> SourcePlan:
    """Lists the tars, each of which is a part. If the first label is an integer, no tar is read further. Names are
    numbered in sorted order; to find them, all tars are scanned: local ones from header to header, others whole."""
    names = list_files(description["path"], "webdataset")

    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(fingerprint, names))
        counts: list[int | None] = [None] * len(names)
        labels = partial(_samples, description=description, read_images=False)
        first = next(label for _, image, label, _ in labels(names[0]) if image)
        if first is None:
            classes: list[str] | None = ["all"]
        elif WHOLE.fullmatch(first):
            classes = None
        else:
            found = list(pool.map(lambda name: [label for _, _, label, _ in labels(name)], names))
            counts = list(map(len, found))
            classes = class_names(frozenset().union(*found) - {None}, description["path"])
    parts = [Part(number, 0, None, count) for number, count in enumerate(counts) if count != 0]

    def count(part: Part, most: int) -> int:
        return sum(1 for _ in islice(_groups(names[part.file], ()), most))

    return SourcePlan(files, classes, cut_off(parts, limit, count))


def read_part(description: dict[str, Any], plan: SourcePlan, part: Part) -> Iterator[Sample]:
    """The samples of a tar, or the first of them. A sample without an image has None instead."""
    file = plan.files[part.file]
    check_unchanged(file)
    numbers = {text: number for number, text in enumerate(plan.classes or ())}
    for where, image, text, left_out in islice(_samples(file["name"], description), part.stop):
        known = 0 if text is None else numbers.get(text)
        label = _class(text, where, len(numbers) or MAX_CLASSES) if known is None else known
        yield Sample(where, image, label, left_out)
    check_unchanged(file)


def _samples(name: str, description: dict[str, Any], read_images: bool = True) -> Iterator[Found]:
    """The samples of a tar. An image is True if it is not read; None if there is none."""
    column, label_column = description["image_column"], description["label_column"]
    images = {column.lower()} if column else IMAGES
    labels = {"json", label_column and label_column.lower()}
    extensions: set[str] = set()
    for key, group, left_out in _groups(name, labels | images if read_images else labels):
        where = f"{name} sample {key}"
        extensions |= group.keys()
        found = [extension for extension in group if extension in images]
        if len(found) > 1:
            these = ", ".join(found)
            raise InputError(f"{where}: has several images ({these}); choose with --image-column, by extension")
        if found:
            label = _label(group, label_column, where)
            if label == "":
                deque(_groups(name, ()), maxlen=0)  # an error if this sample's other members come later
                advice = "--label-column names an extension, or a key in the json; 'none' converts without labels"
                raise InputError(f"{where}: has no label {label_column!r}; it has: {', '.join(group)} ({advice})")
            yield where, group[found[0]] if read_images else True, label, left_out
        else:
            yield where, None, None, left_out
    if not extensions & images:
        ends = ", ".join(sorted(extensions)[:10]) or "none"
        raise InputError(f"{name}: holds no image; its members' extensions are: {ends} (--image-column chooses one)")


def _label(group: Group, column: str | None, where: str) -> str | None:
    """A sample's label as text, empty if it has none: a member, or a key in its json, in which dots go into objects."""
    if column is None:
        return None
    value: Any = None
    if column.lower() in group:
        value = label_text(group[column.lower()], where)
    elif "json" in group:
        try:
            value = json.loads(group["json"])
        except ValueError as error:
            raise InputError(f"{where}: its json cannot be read: {error}") from None
        for name in column.split("."):
            value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | str | None):
        raise InputError(f"{where}: the label {column!r} is {value!r}, expected an integer or a string")
    if value is not None and not class_name(value):
        raise InputError(f"{where}: the label is empty; --label-column none converts without labels")
    return "" if value is None else class_name(value)


def _class(text: str, where: str, classes: int) -> int:
    if not WHOLE.fullmatch(text):
        raise InputError(f"{where}: label {text!r} is not an integer, as the first sample's is")
    if not 0 <= int(text) < classes:
        raise InputError(f"{where}: label {text} is not a class, expected 0 to {classes - 1}")
    return int(text)


def _groups(name: str, wanted: Collection[str]) -> Iterator[tuple[str, Group, tuple[str, ...]]]:
    """The samples of a tar: the common part of their names, their members, read if their extension is wanted, and why
    other members among them are left out. A member without an extension belongs to a sample if it is an image."""
    seen: set[str] = set()
    current: str | None = None
    group: Group = {}
    left_out: list[str] = []
    with _tar(name) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all in memory
            match = NAME.fullmatch(member.name)
            if match is None:
                left_out += [HIDDEN] if member.isreg() else []
                continue
            key, extension = match[1], (match[2] or "").lower()
            if (member.islnk() or member.issym()) and extension in wanted:
                advice = "make the tar with --hard-dereference and --dereference"
                raise InputError(f"{name}: {member.name} is a link; {advice}")
            if not member.isreg():
                continue
            data, large = None, member.size > MAX_BYTES
            if extension in wanted and large and extension:
                raise InputError(f"{name}: {member.name} has {member.size} bytes, expected at most {MAX_BYTES}")
            if (extension in wanted or not extension) and not large:
                data = tar.extractfile(member).read()
            if not extension and (large or not opens(io.BytesIO(data))):
                left_out.append("not an image (no extension)")
                continue
            if key != current:
                if current is not None:
                    yield current, group, tuple(left_out)
                    left_out = []
                if key in seen:
                    what = "occurs twice, or its members do not follow each other; tar --sort=name puts them together"
                    raise InputError(f"{name}: sample {key} {what}")
                seen.add(key)
                current, group = key, {}
            if extension in group:
                raise InputError(f"{name}: sample {key} has two members {extension!r}")
            group[extension] = data
    if current is not None:
        yield current, group, tuple(left_out)


class _Member(tarfile.TarInfo):
    """Reports a broken or missing header, which tarfile takes for the end of the tar. The end is a block of zeros."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"it is cut off or broken: {error}, where a member or the end should be") from None


@contextmanager
def _tar(name: str) -> Iterator[tarfile.TarFile]:
    """An open tar. Its errors become an InputError that names the tar."""
    is_remote, is_packed = name.startswith(SCHEME), name.lower().endswith("gz")
    mode = "r|gz" if is_packed else "r|" if is_remote else "r:"
    try:
        with s3.reading(name):
            file = s3.RemoteFile(name, s3.CHUNK) if is_remote else open(name, "rb")  # noqa: SIM115 - closed below
        with file, tarfile.open(None, mode, file, 1 << 16, tarinfo=_Member) as tar:  # type: ignore[call-overload]
            yield tar
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"{name}: cannot be read: {error}") from error
