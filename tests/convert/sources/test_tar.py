"""WebDataset tars as a source."""

import gzip
import io
import json
import os
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from convert.sources import tar as tar_source
from convert.sources.names import class_name, class_names
from convert.sources.registry import InputError, describe, plan_source, read_part
from sit_composer.data.folders import HIDDEN
from tests.helpers.images import encode


def tar(members, mode="w"):
    """A tar's bytes, of (name, data) pairs."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def write(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar(members, mode))
    return path


def read(source, limit=None, **options):
    description = describe(str(source), **options)
    plan = plan_source(description, limit)
    assert plan == plan_source(description, limit)
    return plan.classes, [(s.image, s.label) for part in plan.parts for s in read_part(description, plan, part)]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_samples_are_members_with_one_name(tmp_path, suffix):
    mode = "w" if suffix == ".tar" else "w:gz"
    first = [
        ("./", b""),
        ("a/n01.x.JPEG", b"not of the format"),
        ("a/n01.cls", b" 3\n"),
        ("a/n01.jpeg", b"one" * 1000),
        ("b.dir/n01.json", b"{}"),
        ("b.dir/n01.png", b"two"),
        ("b.dir/n01.cls", b"0"),
        ("without a dot", b""),
        (".hidden.jpg", b""),
        ("../../etc/n02.PNG", b"three"),
        ("../../etc/n02.cls", b"+12"),
    ]
    write(tmp_path / "d" / f"1{suffix}", first, mode)
    write(tmp_path / "d" / f"2{suffix}", [("n.jpg", b"four"), ("n.cls", b"1")], mode)
    expected = [(b"one" * 1000, 3), (b"two", 0), (b"three", 12), (b"four", 1)]
    assert describe(str(tmp_path / "d"))["format"] == "webdataset"
    assert read(tmp_path / "d") == (None, expected)  # the largest integer is known when all were read
    assert read(tmp_path / "d", 2) == (None, expected[:2])
    assert read(tmp_path / "d", 4) == (None, expected)
    plan = plan_source(describe(str(tmp_path / "d")), 4)
    assert [(part.file, part.rows) for part in plan.parts] == [(0, 3), (1, 1)]
    assert read(tmp_path / "d", label_column="none") == (["all"], [(image, 0) for image, _ in expected])
    assert not list(tmp_path.rglob("*n02*"))


def test_names_are_numbered_in_sorted_order_and_counted(tmp_path):
    for number, names in enumerate((["wolf", "ant"], ["cat", "7"])):
        members = [(f"{k}.{e}", d) for k, n in enumerate(names) for e, d in (("jpg", b"x"), ("cls", n.encode()))]
        write(tmp_path / f"{number}.tar", members)
    assert read(tmp_path) == (["7", "ant", "cat", "wolf"], [(b"x", 3), (b"x", 1), (b"x", 2), (b"x", 0)])
    assert [part.rows for part in plan_source(describe(str(tmp_path))).parts] == [2, 2]
    assert read(tmp_path, 1) == (["7", "ant", "cat", "wolf"], [(b"x", 3)])


@given(st.sets(st.integers(0, 10**6), min_size=1), st.sets(st.text(), max_size=3))
def test_names_that_are_all_numbers_are_in_their_order(numbers, others):
    assert class_names(set(map(str, numbers)), "") == [str(number) for number in sorted(numbers)]
    mixed = {*map(str, numbers), "n", *(text for text in map(class_name, others) if text)}
    assert class_names(mixed, "") == sorted(mixed)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_sample_that_is_a_link_is_not_left_out(tmp_path, kind):
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name, link in (("a.jpg", None), ("b.jpg", "a.jpg")):
            info = tarfile.TarInfo(name)
            info.size = 0 if link else 1
            info.type, info.linkname = (kind, link) if link else (tarfile.REGTYPE, "")
            archive.addfile(info, None if link else io.BytesIO(b"x"))
    with pytest.raises(InputError, match=r"t\.tar: b\.jpg is a link; make the tar with --hard-dereference and"):
        read(tmp_path / "t.tar", label_column="none")


@pytest.mark.parametrize(("labels", "classes"), [([2, 0], None), (["b", "a"], ["a", "b"])])
def test_a_label_may_be_a_key_in_the_json(tmp_path, labels, classes):
    members = []
    for number, label in enumerate(labels):
        data = json.dumps({"meta": {"class": label}, "other": 1}).encode()
        members += [(f"{number}.json", data), (f"{number}.jpg", b"x")]
    path = write(tmp_path / "t.tar", members)
    numbers = [label if classes is None else classes.index(label) for label in labels]
    assert read(path, label_column="meta.class") == (classes, [(b"x", n) for n in numbers])


def test_members_without_an_extension_are_images_if_they_begin_as_one(tmp_path):
    image = encode(Image.new("L", (2, 2)), "PNG")
    members = [(".DS_Store", b""), ("1", image), ("README", b"read me"), ("1.cls", b"\xef\xbb\xbf3\r\n"), ("2", image)]
    path = write(tmp_path / "t.tar", [*members, ("2.CLS", "4".encode("utf-16")), ("d/._x.jpg", b"")])
    description = describe(str(path))
    plan = plan_source(description)
    samples = list(read_part(description, plan, plan.parts[0]))
    assert [(s.image, s.label) for s in samples] == [(image, 3), (image, 4)]
    assert [s.left_out for s in samples] == [(HIDDEN, "not an image (no extension)"), (HIDDEN,)]


def test_columns_may_be_extensions_in_either_case(tmp_path):
    path = write(tmp_path / "t.tar", [("1.Left.PNG", b"left"), ("1.right.png", b"right"), ("1.Class", b"5")])
    assert read(path, image_column="Left.png", label_column="CLASS") == (None, [(b"left", 5)])


def test_columns_may_be_extensions(tmp_path):
    members = [("1.png", b"mask"), ("1.photo.jpg", b"photo"), ("1.label.txt", b"5")]
    path = write(tmp_path / "t.tar", members)
    assert read(path, image_column="photo.jpg", label_column="label.txt") == (None, [(b"photo", 5)])


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 6 * 1024 - 1), packed=st.booleans())
def test_a_tar_that_is_cut_off_anywhere_is_refused(tmp_path, cut, packed):
    """Three samples are six members of 1024 bytes; tarfile itself takes a cut between members for the end."""
    data = tar([(f"{k}.{e}", d) for k in range(3) for e, d in (("jpg", b"picture"), ("cls", b"1"))])
    path = tmp_path / ("t.tar.gz" if packed else "t.tar")
    path.write_bytes(gzip.compress(data[:cut]) if packed else data[:cut])
    with pytest.raises(InputError, match=f"{path}: cannot be read: "):
        read(path)


@pytest.mark.parametrize("packed", [False, True])
def test_broken_tars(tmp_path, packed):
    data = tar([(f"{k}.{e}", d) for k in range(300) for e, d in (("jpg", os.urandom(700)), ("cls", b"1"))])
    path = tmp_path / ("t.tgz" if packed else "t.tar")
    broken = bytearray(data)
    broken[1536 * 2 + 1024 + 5] ^= 1  # in a header
    for bad in (broken, b"", b"<html>" * 1000):
        path.write_bytes(gzip.compress(bad) if packed else bad)
        with pytest.raises(InputError, match=f"{path}: cannot be read: "):
            read(path)
    if packed:
        for bad in (gzip.compress(data)[:-2000], b"<html>", b""):
            path.write_bytes(bad)
            with pytest.raises(InputError, match=f"{path}: cannot be read: "):
                read(path)


GOOD = [("1.jpg", b"x"), ("1.cls", b"1")]


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ([*GOOD, ("2.jpg", b"x")], {}, "sample 2: has no label 'cls'; it has: jpg .--label-column names"),
        ([("1.jpg", b"x"), ("1.cls", b"")], {}, "sample 1: the label is empty"),
        ([*GOOD, ("2.jpg", b"x"), ("2.cls", b"wolf")], {}, "sample 2: label 'wolf' is not an integer, as the first"),
        ([*GOOD, ("2.jpg", b"x"), ("2.cls", b"-1")], {}, "sample 2: label -1 is not a class, expected 0 to"),
        ([*GOOD, ("2.jpg", b"x"), ("2.cls", b"1000000")], {}, "sample 2: label 1000000 is not a class"),
        ([*GOOD, *GOOD], {}, "t.tar: sample 1 has two members 'jpg'"),
        ([*GOOD, ("2.jpg", b""), ("2.cls", b"1"), *GOOD], {}, "sample 1 occurs twice, or its members do not follow"),
        (
            [("1.jpg", b""), ("2.jpg", b""), ("1.cls", b"0")],
            {},
            "sample 1 occurs twice, or .*; tar --sort=name puts them",
        ),
        (
            [("1.cls", b"0"), ("2.cls", b"0"), ("1.jpg", b"x")],
            {},
            "sample 1 occurs twice, or its members do not follow",
        ),
        ([("1.jpg", b"x"), ("1.cls", b"b\xe4r")], {}, r"sample 1: got b.*xe4r., expected text in UTF-8"),
        ([("1.jpg", b"x"), ("1.cls", b"\xef\xbb\xbf ")], {}, "sample 1: the label is empty"),
        ([("1.txt", b"x"), ("1.cls", b"1")], {}, "t.tar: holds no image; its members' extensions are: cls, txt"),
        ([], {}, "t.tar: holds no image; its members' extensions are: none"),
        (GOOD, {"image_column": "jpeg"}, "t.tar: holds no image; .*: cls, jpg .--image-column chooses one"),
        ([*GOOD, ("1.png", b"x")], {}, "sample 1: has several images .jpg, png.; choose with --image-column"),
        ([("1.jpg", b"x"), ("1.json", b"{")], {"label_column": "a"}, "sample 1: its json cannot be read"),
        (
            [("1.jpg", b"x"), ("1.json", b"[]")],
            {"label_column": "a.b"},
            "sample 1: has no label 'a.b'; it has: jpg, json",
        ),
        ([("1.jpg", b"x"), ("1.json", b'{"a": 0.5}')], {"label_column": "a"}, "label 'a' is 0.5, expected an integer"),
        ([("1.jpg", b"x"), ("1.json", b'{"a": true}')], {"label_column": "a"}, "label 'a' is True, expected"),
        ([("1.jpg", b"x"), ("1.json", b'{"a": null}')], {"label_column": "a"}, "sample 1: has no label 'a'"),
        ([("1.jpg", b"x" * 3001), ("1.cls", b"1")], {}, "1.jpg has 3001 bytes, expected at most 3000"),
    ],
)
def test_what_is_wrong_with_a_tar_is_one_line(tmp_path, monkeypatch, members, options, message):
    monkeypatch.setattr(tar_source, "MAX_BYTES", 3000)
    with pytest.raises(InputError, match=message) as raised:
        read(write(tmp_path / "t.tar", members), **options)
    assert str(tmp_path / "t.tar") in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_a_sample_without_a_picture_is_left_to_who_decodes(tmp_path):
    members = [("README.md", b""), *GOOD, ("2.cls", b"1"), ("3.jpg", b"z"), ("3.cls", b"2")]
    assert read(write(tmp_path / "t.tar", members)) == (None, [(None, 0), (b"x", 1), (None, 0), (b"z", 2)])


def test_a_tar_that_changed_since_the_plan_is_refused(tmp_path):
    members = [(f"{k}.{e}", d) for k in range(99) for e, d in (("jpg", os.urandom(7000)), ("cls", b"1"))]
    path = write(tmp_path / "t.tar", members)
    description = describe(str(path))
    plan = plan_source(description)
    samples = read_part(description, plan, plan.parts[0])
    next(samples)
    os.truncate(path, 300 * 1024)
    with pytest.raises(InputError, match=f"{path}: cannot be read: "):
        list(samples)
    with pytest.raises(InputError, match=f"{path}: changed since the conversion began"):
        list(read_part(description, plan, plan.parts[0]))


def test_a_large_tar_is_not_held_in_memory(tmp_path):
    import tracemalloc

    members = [(f"{k}.jpg", bytes(100_000)) for k in range(100)] + [(f"small/{k}.jpg", b"") for k in range(4000)]
    path = write(tmp_path / "t.tar", members)
    description = describe(str(path), label_column="none")
    plan = plan_source(description)
    tracemalloc.start()
    assert sum(len(sample.image) for sample in read_part(description, plan, plan.parts[0])) == 10_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
