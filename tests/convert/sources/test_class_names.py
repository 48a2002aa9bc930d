"""Names of classes from a file, and ImageNet's."""

import json
import re

import pytest
from torchvision.models._meta import _IMAGENET_CATEGORIES

from convert.sources.class_names import IMAGENET, name_classes, read_class_names
from convert.sources.parts import InputError


def named(tmp_path, content, classes):
    """The ids and names that a file of this content gives to the classes of a source."""
    path = tmp_path / "names.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return name_classes(str(path), read_class_names(str(path)), classes)[1:]


@pytest.mark.parametrize(
    "content",
    [
        "n1 tench\nn2 great white shark\n",
        "\ufeffn2\tgreat white shark\r\n\r\n  n1\ttench  ",
        json.dumps({"n2": "great white shark", "n1": "tench"}),
        "\ufeff" + json.dumps({"n1": "tench", "n2": "great white shark"}, indent=1),
    ],
)
def test_names_are_given_by_lines_or_by_json(tmp_path, content):
    both = ["n1", "n2"], ["tench", "great white shark"]
    assert named(tmp_path, content, ["n1", "n2"]) == both
    assert named(tmp_path, content, None) == both  # the source has numbers, and says only later how many
    assert named(tmp_path, content, ["0", "1"]) == both


def test_ids_may_be_numbers_or_have_spaces(tmp_path):
    ten = "".join(f"{k} digit {k}\n" for k in range(11))
    assert named(tmp_path, ten, [str(k) for k in range(11)])[1][9:] == ["digit 9", "digit 10"]
    assert named(tmp_path, ten, None)[0] == [str(k) for k in range(11)]
    assert named(tmp_path, "my class\tA, b\nother\tC", ["my class", "other"])[1] == ["A, b", "C"]


def test_a_name_of_several_classes_gets_their_ids(tmp_path):
    found = named(tmp_path, "n1 crane\nn2 tench\nn3 crane\n", ["n1", "n2", "n3"])
    assert found[1] == ["crane (n1)", "tench", "crane (n3)"]


@pytest.mark.parametrize(
    ("content", "classes", "message"),
    [
        ("n1 a\nn3 c", ["n1", "n2"], "has no line for class 'n2' of the source"),
        ("n1 a\n\nn2 b\nn3 c", ["n1", "n2"], "line 4: the source has no class 'n3'"),
        ("n1 a\nn2 b\nn1 c", ["n1", "n2"], "line 3: the id 'n1' occurs twice, first in "),
        ('{"n1": "a", "n1": "b"}', ["n1"], "entry 2: the id 'n1' occurs twice"),
        ("n1 a\nn2\n", ["n1", "n2"], "line 2: got 'n2' and '', expected a class's id and its name"),
        ('{"n1": 3}', ["n1"], "entry 1: got 'n1' and 3"),
        ('{"n1": {"a": "b"}}', ["n1"], "entry 1: got 'n1'"),
        ('{"n1": "a"', ["n1"], "is no JSON"),
        ("", ["n1"], "is empty"),
        (b"n1 caf\xe9", ["n1"], "expected text in UTF-8"),
        ("1 a\n2 b", None, "has no line for class '0'"),
        ("n1 a\nn2 b", ["0", "1", "2"], "has no line for class '2'"),
        ("n1 a\nn2 b\nn3 c", ["0", "1"], "line 3: the source has no class 'n3'"),
    ],
)
def test_what_does_not_fit_is_told_with_its_line(tmp_path, content, classes, message):
    with pytest.raises(InputError, match=r"^--class-names: .*names\.txt") as raised:
        named(tmp_path, content, classes)
    assert message in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_imagenets_classes_are_all_there_in_the_order_of_their_labels():
    names = read_class_names("imagenet")
    ids = list(names)
    assert ids == sorted(ids)
    assert all(re.fullmatch(r"n\d{8}", id_) for id_ in ids)
    pairs = zip((name.name.partition(" (")[0] for name in names.values()), _IMAGENET_CATEGORIES, strict=True)
    assert sum(ours.lower() == theirs.lower() for ours, theirs in pairs) > 990  # the others are other words for them
    assert len({name.name.lower() for name in names.values()}) == 1000
    some = {label: names[ids[label]].name for label in (0, 134, 517, 999)}
    assert some == {0: "tench", 134: "crane (bird)", 517: "crane (machine)", 999: "toilet tissue"}
    numbers, _, found = name_classes("imagenet", names, ["0", "1"])
    assert (len(numbers), found[:2], len(found)) == (1000, ["tench", "goldfish"], 1000)
    assert name_classes("imagenet", names, ids[5:7])[1:] == (ids[5:7], ["electric ray", "stingray"])
    assert "," not in IMAGENET.read_text()  # which divides the names of --classes
