"""WebDataset tars: a sample is the members that follow each other and whose file names agree up to the first dot.

The rest of the name, its extension, says what a member is: a picture (jpg, png, …), its label (cls: an integer or a
name), or both's description (json). Nothing is extracted to files, so that no member's path matters.
"""

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

from convert.sources.files import fingerprint, list_files
from convert.sources.names import SCHEME, SUFFIXES, check_same
from convert.sources.parts import MAX_CLASSES, InputError, Part, Sample, SourcePlan, cut_off, in_order

PICTURES = {suffix.removeprefix(".") for suffix, format in SUFFIXES.items() if format == "imagefolder"}
NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
INTEGER = re.compile(r"[+-]?\d{1,20}", re.ASCII)
MAX_BYTES = 1 << 28  # of a picture's or label's member
OPENED_AT_ONCE = 8

Group = dict[str, bytes | None]  # the bytes of each member by its extension; None: they were not wanted


def plan_tars(description: dict[str, Any], limit: int | None) -> SourcePlan:
    """Lists the tars, each of which is a part.

    The first label tells what all are. Integers are not counted: that would mean reading all. Names are numbered in
    sorted order, for which all tars are walked through: here from header to header, in an object store by reading them.

    Raises:
        InputError: if one cannot be read, or the first has no picture with a label.
    """
    names = list_files(description["path"], "webdataset")
    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        files = list(pool.map(fingerprint, names))
        counts: list[int | None] = [None] * len(names)
        first = _first_label(names[0], description)
        if first is None:
            classes: list[str] | None = ["all"]
        elif INTEGER.fullmatch(first):
            classes = None
        else:
            counts, labels = zip(*pool.map(partial(_count, description=description), names), strict=True)
            classes = in_order(frozenset().union(*labels))
    parts = [Part(number, 0, None, count) for number, count in enumerate(counts) if count != 0]
    return SourcePlan(files, classes, cut_off(parts, limit, lambda part, most: _count(names[part.file], None, most)[0]))


def read_tars(description: dict[str, Any], plan: SourcePlan, part: Part) -> Iterator[Sample]:
    """The samples of a tar, or the first of them. One without a picture has None in its place.

    Raises:
        InputError: if the tar is broken, has changed, or holds no picture; for a label that is missing or no class.
    """
    file = plan.files[part.file]
    name = file["name"]
    check_same(file, fingerprint(name))
    numbers = {text: number for number, text in enumerate(plan.classes or ())}
    extensions: set[str] = set()
    pictures = 0
    for key, group in islice(_groups(name, lambda extension: _serves(extension, description)), part.stop):
        where = f"{name} sample {key}"
        extensions |= group.keys()
        extension = _picture(group, description, where)
        if extension is None:
            yield Sample(where, None, 0)
            continue
        pictures += 1
        text = _label(group, description, where)
        label = 0 if text is None else numbers[text] if plan.classes else _class(text, where)
        yield Sample(where, group[extension], label)
    if not pictures:
        raise _no_picture(name, extensions)
    check_same(file, fingerprint(name))


def _first_label(name: str, description: dict[str, Any]) -> str | None:
    extensions: set[str] = set()
    for key, group in _groups(name, lambda extension: _serves(extension, description)):
        extensions |= group.keys()
        where = f"{name} sample {key}"
        if _picture(group, description, where) is not None:
            return _label(group, description, where)
    raise _no_picture(name, extensions)


def _count(name: str, description: dict[str, Any] | None, most: int | None = None) -> tuple[int, set[str]]:
    """The samples of a tar, but not beyond ``most``; and, if there is a description, their labels."""
    count, labels = 0, set()
    wanted = (
        (lambda extension: False) if description is None else (lambda e: e in ("json", description["label_column"]))
    )
    for key, group in islice(_groups(name, wanted), most):
        count += 1
        where = f"{name} sample {key}"
        if description is not None and _picture(group, description, where) is not None:
            labels.add(_label(group, description, where))
    return count, labels


def _serves(extension: str, description: dict[str, Any]) -> bool:
    """Whether a member is needed, by its extension."""
    image, label = description["image_column"], description["label_column"]
    return extension == image or (image is None and extension in PICTURES) or extension in ("json", label)


def _picture(group: Group, description: dict[str, Any], where: str) -> str | None:
    """The extension of a sample's picture."""
    column = description["image_column"]
    found = [extension for extension in group if extension == column or (column is None and extension in PICTURES)]
    if len(found) > 1:
        raise InputError(f"{where} has several pictures ({', '.join(found)}): choose with --image-column, by extension")
    return found[0] if found else None


def _label(group: Group, description: dict[str, Any], where: str) -> str | None:
    """A sample's label as text: that of a member, or of a key in its json, in which dots go into objects."""
    column = description["label_column"]
    if column is None:
        return None
    if column in group:
        value: Any = group[column].decode("utf-8", "replace").strip()
    elif "json" in group:
        value = _json_value(group["json"], column, where)
    else:
        value = None
    if value is None or value == "":
        raise InputError(
            f"{where} has no label {column!r}; it has: {', '.join(group)} (--label-column names an extension, or a key "
            "in the json; 'none' does without labels)"
        )
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InputError(f"{where}: labels must be integers or strings, but {column!r} is {value!r}")
    return str(value)


def _json_value(data: bytes, column: str, where: str) -> Any:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise InputError(f"{where}: its json cannot be read: {error}") from None
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _class(text: str, where: str) -> int:
    if not INTEGER.fullmatch(text):
        raise InputError(f"{where}: label {text!r} is no integer, as the first sample's is: they must be all of a kind")
    if not 0 <= int(text) < MAX_CLASSES:
        raise InputError(f"{where}: label {text} is not a class: they are 0 to {MAX_CLASSES - 1}")
    return int(text)


def _no_picture(name: str, extensions: set[str]) -> InputError:
    ends = ", ".join(sorted(extensions)[:10]) or "nothing that has one"
    return InputError(f"{name} holds no picture; its members' extensions are: {ends} (--image-column chooses one)")


def _groups(name: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Group]]:
    """The samples of a tar: what their names have in common, and their members."""
    seen: set[str] = set()
    current, group = None, {}
    with _tar(name) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile keeps them all, which would fill the memory
            match = NAME.fullmatch(member.name)
            if match is None or not (member.isreg() or member.islnk() or member.issym()):
                continue
            key, extension = match[1], match[2].lower()
            if not member.isreg():
                if wanted(extension):
                    raise InputError(
                        f"{name}: {member.name} is a link; make the tar with --hard-dereference and --dereference"
                    )
                continue
            if key != current:
                if current is not None:
                    yield current, group
                if key in seen:
                    raise InputError(f"{name}: sample {key} occurs twice, or its members do not follow each other")
                seen.add(key)
                current, group = key, {}
            if extension in group:
                raise InputError(f"{name}: sample {key} has two members {extension!r}")
            group[extension] = _read(tar, member, name) if wanted(extension) else None
    if current is not None:
        yield current, group


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> bytes:
    if member.size > MAX_BYTES:
        raise InputError(f"{name}: {member.name} has {member.size} bytes: no picture or label has so many")
    return tar.extractfile(member).read()


class _Member(tarfile.TarInfo):
    """tarfile takes a broken header, and the lack of any, for the end of the tar. The end is a block of zeros."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"it is cut off or broken: {error}, where a member or the end should be") from None


@contextmanager
def _tar(name: str) -> Iterator[tarfile.TarFile]:
    """An open tar. Its errors become an InputError that names it."""
    is_remote, is_packed = name.startswith(SCHEME), name.lower().endswith("gz")
    mode = "r|gz" if is_packed else "r|" if is_remote else "r:"
    try:
        with _open(name) as file, tarfile.open(fileobj=file, mode=mode, tarinfo=_Member, bufsize=1 << 16) as tar:
            yield tar
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"cannot read {name}: {error}") from error


def _open(name: str) -> io.IOBase:
    if not name.startswith(SCHEME):
        return open(name, "rb")
    from convert.sources import s3 as remote

    with remote.reading(name):
        return remote.RemoteFile(name, remote.CHUNK)
