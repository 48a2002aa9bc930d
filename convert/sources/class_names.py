"""Names for a source's classes, which `--class-names` gives by their ids: WordNet's numbers for ImageNet's, say."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from convert.sources.names import class_names, label_text
from convert.sources.parts import InputError
from sit_composer.data.imagenet import IMAGENET


class ClassName(NamedTuple):
    """A class's name, and the place where it is given."""

    name: str
    where: str


def read_class_names(given: str) -> dict[str, ClassName]:
    """The names in a file, by id: lines `ID NAME`, or a JSON object. `imagenet` stands for the file of the package."""
    path = IMAGENET if given == "imagenet" else Path(given)
    try:
        text = label_text(path.read_bytes(), f"--class-names: {given}")
    except OSError as error:
        raise InputError(f"--class-names: {given}: cannot be read: {error.strerror}") from None
    is_json = path.suffix.lower() == ".json" or text.lstrip().startswith("{")
    names: dict[str, ClassName] = {}
    for where, id_, name in _from_json(text, given) if is_json else _from_lines(text, given):
        if not id_ or not isinstance(name, str) or not name.strip():
            raise InputError(f"--class-names: {where}: got {id_!r} and {name!r}, expected a class's id and its name")
        if id_ in names:
            raise InputError(f"--class-names: {where}: the id {id_!r} occurs twice, first in {names[id_].where}")
        names[id_] = ClassName(name.strip(), where)
    if not names:
        raise InputError(f"--class-names: {given}: is empty, expected lines of an id and a name")
    return names


def _from_lines(text: str, given: str) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            id_, _, name = line.strip().partition("\t" if "\t" in line.strip() else " ")
            yield f"{given} line {number}", id_.strip(), name


def _from_json(text: str, given: str) -> Iterator[tuple[str, str, Any]]:
    try:
        pairs = json.loads(text, object_pairs_hook=list)  # a dict would hide an id that occurs twice
    except (ValueError, RecursionError) as error:
        raise InputError(f"--class-names: {given}: is no JSON: {error}") from None
    if not text.lstrip().startswith("{"):
        raise InputError(f"--class-names: {given}: expected a JSON object of ids and names")
    yield from ((f"{given} entry {number}", id_, name) for number, (id_, name) in enumerate(pairs, 1))


def name_classes(
    given: str, names: dict[str, ClassName], classes: list[str] | None
) -> tuple[list[str], list[str], list[str]]:
    """The classes as the source calls them, their ids, and their names, each by label.

    If the source has numbers alone (None: how many is unknown), and the ids are others, label k is the k-th id. Only
    `imagenet` may name more classes than the source has. A name of several classes gets each one's id.
    """
    ids, numbers = class_names(names, f"--class-names: {given}"), [str(number) for number in range(len(names))]
    only_numbers = classes is None or classes == [str(number) for number in range(len(classes))]
    id_of = dict(zip(ids if all(map(str.isdecimal, ids)) or not only_numbers else numbers, ids, strict=True))
    if classes is None or (only_numbers and given == "imagenet"):
        classes = numbers
    if missing := [class_ for class_ in classes if class_ not in id_of]:
        raise InputError(f"--class-names: {given}: has no line for class {missing[0]!r} of the source")
    known = set(classes)
    if given != "imagenet" and (extra := [id_ for class_, id_ in id_of.items() if class_ not in known]):
        raise InputError(f"--class-names: {names[extra[0]].where}: the source has no class {extra[0]!r}")
    ids = [id_of[class_] for class_ in classes]
    counts = Counter(names[id_].name for id_ in ids)
    return classes, ids, [names[i].name if counts[names[i].name] == 1 else f"{names[i].name} ({i})" for i in ids]
