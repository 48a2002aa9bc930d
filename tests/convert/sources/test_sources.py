"""convert/sources: the formats of sources, their parts, and what is read of each."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from convert.sources import parts
from convert.sources.registry import InputError, Part, describe, plan_source, read_part
from tests.helpers.paths import ROOT
from tests.helpers.sources import write_folder, write_parquet

PICTURES = [bytes([65 + k]) * (40 + k) for k in range(6)]  # no source looks inside


def read(source, limit=None, **options):
    """The classes, and (image, label) of every sample, read part by part as elsewhere: from a plan's JSON."""
    description = describe(str(source), **options)
    plan = plan_source(description, limit)
    assert plan == plan_source(description, limit)
    samples = []
    for part in plan.parts:
        read = list(read_part(description, plan, Part(**asdict(part))))
        assert part.rows is None or len(read) == part.rows
        samples += read
    return plan.classes, [(s.image.read_bytes() if isinstance(s.image, Path) else s.image, s.label) for s in samples]


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "PART", 2)


# --- Parquet and Arrow ---------------------------------------------------------------------------------------------


def test_parquet_folder_keeps_bytes_and_order(tmp_path):
    # The second file has several row groups, and lies below the first in name only.
    write_parquet(tmp_path / "data" / "b.parquet", PICTURES[:2], [0, 3])
    write_parquet(tmp_path / "data" / "a" / "z.parquet", PICTURES[2:], [1, 1, 0, 3], row_group_size=1)
    classes, samples = read(tmp_path / "data")
    assert samples == list(zip(PICTURES[2:] + PICTURES[:2], [1, 1, 0, 3, 0, 3], strict=True))
    assert classes == ["0", "1", "2", "3"]
    expected = {"format": "parquet", "path": str(tmp_path / "data"), "image_column": "image", "label_column": "label"}
    assert describe(str(tmp_path / "data")) == expected


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(st.lists(st.integers(1, 30), max_size=6), min_size=1, max_size=4),
    size=st.integers(1, 9),
    limit=st.none() | st.integers(1, 99),
    layout=st.sampled_from(["parquet", "file", "stream"]),
)
def test_parts_together_are_the_table(tmp_path, monkeypatch, files, size, limit, layout):
    """Whatever the groups of rows, the size of parts, and the limit."""
    monkeypatch.setattr(parts, "PART", size)
    for old in tmp_path.iterdir():
        old.unlink()
    images = []
    for number, lengths in enumerate(files):
        rows = sum(lengths)
        table = pa.table({"image": [f"{number}-{row}".encode() for row in range(rows)], "label": [0] * rows})
        table = table.cast(pa.schema({"image": pa.binary(), "label": pa.int64()}))
        images += table["image"].to_pylist()
        make = {"parquet": pq.ParquetWriter, "stream": pa.ipc.new_stream, "file": pa.ipc.new_file}[layout]
        suffix = "parquet" if layout == "parquet" else "arrow"
        with make(str(tmp_path / f"{number}.{suffix}"), table.schema) as writer:
            for length, end in zip(lengths, accumulate(lengths), strict=True):
                writer.write_table(table.slice(end - length, length))
    _, samples = read(tmp_path, limit)
    assert [image for image, _ in samples] == images[:limit]
    plan = plan_source(describe(str(tmp_path)), limit)
    assert all(0 < part.rows <= 2 * size for part in plan.parts)


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([1000] * 11, [5000, 5000, 1000]),
        ([8000, 8000], [8000, 8000]),
        ([1000, 8000, 1000], [1000, 8000, 1000]),
        ([10, 20_000, 10], [10, 4000, 4000, 4000, 4000, 4000, 10]),
        ([], []),
        ([0, 0], []),
    ],
)
def test_groups_of_rows_are_joined_or_cut(lengths, rows):
    assert [part.rows for part in parts.cut(0, lengths)] == rows


@pytest.mark.parametrize("layout", ["file", "stream", "feather", "compressed"])
def test_arrow_in_each_layout(tmp_path, layout, small_parts):
    images = PICTURES * 30  # more rows than are read at a time
    table = pa.table(
        {"x": list(range(180)), "image": images, "label": pa.array([k % 7 for k in range(180)], pa.int8())}
    )
    path = tmp_path / "data" / "t.arrow"
    path.parent.mkdir()
    if layout == "feather":
        pyarrow.feather.write_feather(table, path := path.with_suffix(".feather"), compression="lz4")
    else:
        make = pa.ipc.new_stream if layout == "stream" else pa.ipc.new_file
        options = pa.ipc.IpcWriteOptions(compression="zstd" if layout == "compressed" else None)
        with make(str(path), table.schema, options=options) as writer:
            writer.write_table(table)
    (path.parent / "state.txt").write_text("not a table")
    assert read(path.parent)[1] == [(image, k % 7) for k, image in enumerate(images)]


def test_glob_takes_only_what_it_matches(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", PICTURES[:2], [0, 1])
    write_parquet(tmp_path / "test-0.parquet", PICTURES[2:4], [0, 1])
    with pytest.raises(InputError, match=r"several splits \(test, train\); give a glob"):
        describe(str(tmp_path))
    assert [image for image, _ in read(f"{tmp_path}/train*")[1]] == PICTURES[:2]


def test_nested_column_and_limit(tmp_path):
    table = pa.table({"picture": [{"data": {"jpg": j}, "class": k} for k, j in enumerate(PICTURES)]})
    pq.write_table(table, tmp_path / "t.parquet")
    columns = {"image_column": "picture.data.jpg", "label_column": "picture.class"}
    classes, samples = read(tmp_path / "t.parquet", 2, **columns)
    assert samples == [(PICTURES[0], 0), (PICTURES[1], 1)]
    assert len(classes) == 6  # of the whole source, so that a sample of it trains the same network


def test_struct_without_bytes_names_a_file_beside_the_table(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.jpg").write_bytes(PICTURES[1])
    images = [{"bytes": PICTURES[0], "path": "nowhere.jpg"}, {"bytes": None, "path": "pictures/1.jpg"}]
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet")[1] == [(PICTURES[0], 0), (PICTURES[1], 1)]


@pytest.mark.parametrize("path", ["../secret.jpg", "pictures/../../secret.jpg", "{}/secret.jpg"])
def test_a_table_cannot_name_a_file_outside_its_folder(tmp_path, path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "data").mkdir()
    images = [{"bytes": None, "path": path.format(tmp_path)}]
    pq.write_table(pa.table({"image": images, "label": [0]}).cast(IMAGE_STRUCT), tmp_path / "data" / "t.parquet")
    with pytest.raises(InputError, match=r"t\.parquet row 0: .*: the image's path leads out of"):
        read(tmp_path / "data" / "t.parquet")


IMAGE_STRUCT = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()})


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_string_labels_are_numbered_in_the_order_of_their_names(tmp_path, type_):
    for file, rows in (("a", ["wolf", "ant"]), ("b", ["cat", "wolf"])):
        write_parquet(tmp_path / "d" / f"{file}.parquet", PICTURES[:2], pa.array(rows).cast(type_))
    classes, samples = read(tmp_path / "d")
    assert classes == ["ant", "cat", "wolf"]
    assert [label for _, label in samples] == [2, 0, 1, 2]


@pytest.mark.parametrize("type_", [pa.int8(), pa.uint8(), pa.int32(), pa.uint64(), pa.int64()])
def test_any_integer_type_is_a_label(tmp_path, type_):
    write_parquet(tmp_path / "t.parquet", PICTURES[:3], pa.array([2, 0, 1], type_))
    assert [label for _, label in read(tmp_path / "t.parquet")[1]] == [2, 0, 1]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(labels=st.lists(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), st.integers(0, 9)), min_size=1))
def test_labels_are_either_all_classes_or_refused_by_row(tmp_path, labels):
    path = write_parquet(tmp_path / "t.parquet", [b""] * len(labels), pa.array(labels, pa.int64()))
    bad = [row for row, label in enumerate(labels) if label is None or not 0 <= label < 1_000_000]
    if bad:
        with pytest.raises(InputError, match=rf"t.parquet row ({'|'.join(map(str, bad))}): "):
            read(path)
    else:
        classes, samples = read(path)
        assert [label for _, label in samples] == labels
        assert len(classes) == max(labels) + 1


def test_without_labels(tmp_path, small_parts):
    pq.write_table(pa.table({"image": PICTURES}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="has no column 'label'; its columns are: 'image'"):
        read(tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet", label_column="none") == (["all"], [(image, 0) for image in PICTURES])
    write_folder(tmp_path / "loose", a=PICTURES[:3], d=PICTURES[3:4])
    (tmp_path / "loose" / "a" / "b").mkdir()
    (tmp_path / "loose" / "a" / "b" / "deep.png").write_bytes(PICTURES[4])
    (tmp_path / "loose" / ".hidden").mkdir()
    (tmp_path / "loose" / ".hidden" / "x.jpg").write_bytes(b"")
    (tmp_path / "loose" / "x.jpg").write_bytes(PICTURES[5])
    order = [4, 0, 1, 2, 3, 5]  # the folders inside before a folder's own
    assert read(tmp_path / "loose", label_column="none") == (["all"], [(PICTURES[k], 0) for k in order])


def test_a_row_group_that_is_cut_is_read_once_if_its_parts_are_read_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART", 100)
    path = write_parquet(tmp_path / "t.parquet", [b"%d" % k for k in range(1000)], [0] * 1000, row_group_size=950)
    begun = []
    iter_batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *a, **k: begun.append(k) or iter_batches(*a, **k))
    description = describe(str(path))
    plan = plan_source(description)
    assert len(plan.parts) == 11
    begun.clear()
    rows = [[int(s.image) for s in read_part(description, plan, part)] for part in plan.parts]
    assert [row for part in rows for row in part] == list(range(1000))
    assert len(begun) == 2
    # In any other order, and where one is left in the middle, parts are the same.
    next(read_part(description, plan, plan.parts[3]))
    for number in (4, 3, 3, 4, 10, 0):
        assert [int(s.image) for s in read_part(description, plan, plan.parts[number])] == rows[number]


def test_a_large_row_group_is_not_held_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.bytes(100_000) for _ in range(400)]
    path = write_parquet(tmp_path / "t.parquet", images, [0] * 400, write_batch_size=10, use_dictionary=False)
    assert pq.ParquetFile(path).num_row_groups == 1
    del images
    description = describe(str(path))
    plan = plan_source(description)
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in read_part(description, plan, plan.parts[0])]
    assert len(held) == 400
    assert max(held) < 0.6 * path.stat().st_size  # 64 rows of 400, at most some copies of them


# --- Hugging Face --------------------------------------------------------------------------------------------------


@pytest.fixture
def hf_rows(tmp_path, monkeypatch):
    """A real `datasets` data set with an Image and a ClassLabel; its cache kept out of the home folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["zebra", "ant", "cow"]))
    rows = {"image": [{"bytes": j, "path": None} for j in PICTURES], "label": [0, 1, 0, 1, 0, 0]}
    return datasets.Dataset.from_dict(rows, features=features)


HF = ["zebra", "ant", "cow"], list(zip(PICTURES, [0, 1, 0, 1, 0, 0], strict=True))


def test_hugging_face_data_set_saved_to_disk(tmp_path, hf_rows, small_parts):
    hf_rows.save_to_disk(tmp_path / "saved", num_shards=2)
    assert describe(str(tmp_path / "saved"))["format"] == "hf"
    assert read(tmp_path / "saved") == HF
    # Its files, read without the library; a cache of a transformed copy does not count.
    (tmp_path / "saved" / "cache-0123456789abcdef.arrow").write_bytes(b"")
    assert read(tmp_path / "saved", format="arrow") == HF
    with pytest.raises(InputError, match="without splits; leave out --split"):
        describe(str(tmp_path / "saved"), split="test")


def test_a_glob_names_a_file_once(tmp_path):
    write_parquet(tmp_path / "a" / "b" / "t.parquet", PICTURES[:2], [0, 1])
    assert read(f"{tmp_path}/**/**/*.parquet")[1] == [(PICTURES[0], 0), (PICTURES[1], 1)]
    with pytest.raises(InputError, match="no such file or folder; braces are not expanded, but globs are"):
        read(f"{tmp_path}/t-{{0..2}}.parquet")


@pytest.mark.parametrize("path", ["{}/secret.png", "{}/saved/../secret.png", "http://127.0.0.1:9/secret.png"])
def test_a_hugging_face_data_set_takes_no_file_from_elsewhere(tmp_path, path):
    import datasets

    (tmp_path / "secret.png").write_bytes(PICTURES[0])
    whole, other = {"bytes": PICTURES[0], "path": None}, {"bytes": None, "path": path.format(tmp_path)}
    rows = {"image": [whole, other], "label": [0, 0]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"row 1: .*secret.png': the image's path leads out of the data set"):
        read(tmp_path / "saved")


def test_hugging_face_splits(tmp_path, hf_rows):
    import datasets

    datasets.DatasetDict(train=hf_rows.select([5, 4]), test=hf_rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="has no split 'dev'; its splits are: train, test"):
        read(tmp_path / "saved", split="dev")
    assert read(tmp_path / "saved", split="test") == HF
    assert [image for image, _ in read(tmp_path / "saved")[1]] == [PICTURES[5], PICTURES[4]]


def test_hugging_face_data_set_as_parquet_keeps_its_class_names(tmp_path, hf_rows):
    hf_rows.to_parquet(tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet") == HF


def test_hugging_face_library_loads_what_it_knows(tmp_path, hf_rows):
    """load_dataset, which also takes names on the Hub, on a folder with two configurations."""
    folder = tmp_path / "repo"
    for name, rows in (("big", hf_rows), ("small", hf_rows.select([3]))):
        (folder / name).mkdir(parents=True)
        rows.to_parquet(folder / name / "train-0.parquet")
    configs = "".join(f"- config_name: {n}\n  data_files: {n}/*.parquet\n" for n in ("big", "small"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(InputError, match="big"):
        read(folder, format="hf")
    assert read(folder, format="hf", config="big") == HF
    pictures = write_folder(tmp_path / "pictures", ant=PICTURES[:2], bee=PICTURES[2:3])
    classes, samples = read(pictures, format="hf")
    assert sorted(samples) == sorted(zip(PICTURES[:3], [0, 0, 1], strict=True))
    assert classes == ["ant", "bee"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_hugging_face_library_reads_metadata_as_pandas_and_polars_write_it(tmp_path, hf_rows, kind):
    root = tmp_path / "folder"
    root.mkdir()
    for number in range(2):
        (root / f"{number}.png").write_bytes(PICTURES[number])
    rows = {"file_name": ["0.png", "1.png"], "label": ["wolf", "ant"]}
    if kind == "csv":
        (root / "metadata.csv").write_text("file_name,label\n0.png,wolf\n1.png,ant\n")
    elif kind == "jsonl":
        lines = ({name: values[number] for name, values in rows.items()} for number in range(2))
        (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    else:
        pq.write_table(
            pa.table({name: pa.array(v, pa.large_string()) for name, v in rows.items()}), root / "metadata.parquet"
        )
    assert read(root, format="hf") == (["ant", "wolf"], [(PICTURES[0], 1), (PICTURES[1], 0)])


@pytest.fixture
def streamed(tmp_path, hf_rows):
    """A folder that `datasets` streams in two shards."""
    (tmp_path / "repo").mkdir()
    for number in range(2):
        hf_rows.select(range(3 * number, 3 * number + 3)).to_parquet(tmp_path / "repo" / f"train-{number}.parquet")
    return tmp_path / "repo"


def test_hugging_face_data_set_is_streamed_shard_by_shard(tmp_path, streamed):
    description = describe(str(streamed), "hf", streaming=True)
    assert description["streaming"] is True
    assert plan_source(description).parts == [Part(0, 0, None, None), Part(1, 0, None, None)]
    assert read(streamed, format="hf", streaming=True) == HF
    assert read(streamed, 4, format="hf", streaming=True) == (HF[0], HF[1][:4])
    assert [part.rows for part in plan_source(description, 4).parts] == [3, 1]
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.arrow"))
    with pytest.raises(InputError, match="--streaming: only for Hugging Face data sets"):
        describe(str(streamed), streaming=True)
    with pytest.raises(InputError, match=r"shard 0: has no column 'no'; its columns are: 'image', 'image\.bytes'"):
        read(streamed, format="hf", streaming=True, label_column="no")


def test_a_streamed_data_set_that_changed_since_the_plan_is_refused(streamed, hf_rows):
    description = describe(str(streamed), "hf", streaming=True)
    plan = plan_source(description)
    hf_rows.select(range(2)).to_parquet(streamed / "train-1.parquet")
    from convert.sources import hf as hf_source

    hf_source._load.cache_clear()  # as in another process
    with pytest.raises(InputError, match="changed since the conversion began"):
        list(read_part(description, plan, plan.parts[1]))


def test_streamed_labels_are_checked_as_they_come(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    options = {"format": "hf", "streaming": True}
    write_parquet(tmp_path / "repo" / "train.parquet", PICTURES[:3], [4, 0, 7])
    assert read(tmp_path / "repo", **options) == (None, list(zip(PICTURES, [4, 0, 7], strict=False)))
    write_parquet(tmp_path / "repo" / "train.parquet", PICTURES[:3], [4, 0, -7])
    with pytest.raises(InputError, match="shard 0 row 2: label -7 is not a class"):
        read(tmp_path / "repo", **options)
    write_parquet(tmp_path / "repo" / "train.parquet", PICTURES[:3], ["a", "b", "c"])
    with pytest.raises(InputError, match="has strings, expected integers with --streaming"):
        read(tmp_path / "repo", **options)


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_pictures_in_an_archive(tmp_path, monkeypatch, streaming):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = write_folder(tmp_path / "train", ant=PICTURES[:2], bee=PICTURES[2:3])
    (tmp_path / "repo").mkdir()
    shutil.make_archive(str(tmp_path / "repo" / "train"), "zip", tmp_path, "train")
    shutil.rmtree(root)
    classes, samples = read(tmp_path / "repo", format="hf", streaming=streaming)
    assert sorted(image for image, _ in samples) == PICTURES[:3]
    assert classes == ["ant", "bee"]


def test_class_label_outside_its_names_is_refused(tmp_path, hf_rows):
    hf_rows.to_parquet(tmp_path / "t.parquet")
    table = pq.read_table(tmp_path / "t.parquet")
    for label, row in ((3, 4), (-1, 0)):
        labels = [label if k == row else 0 for k in range(6)]
        pq.write_table(table.set_column(1, table.schema.field(1), [labels]), tmp_path / "t.parquet")
        with pytest.raises(InputError, match=f"row {row}: label {label} is not a class, expected 0 to 2"):
            read(tmp_path / "t.parquet")


def test_a_name_that_is_neither_here_nor_on_the_hub(monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # asked for real, it tries for half a minute
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError,
        match="nobody/nothing: cannot be loaded, it is neither a path here nor readable as a data set on the Hub",
    ):
        read("nobody/nothing")


# --- folders and digits --------------------------------------------------------------------------------------------


def test_image_folder_in_many_formats(tmp_path, small_parts):
    root = write_folder(tmp_path / "pictures", wolf=PICTURES[:1], ant=[], bat=[], cow=PICTURES[1:3])
    names = [f"{f}.{f}" for f in ("png", "webp", "bmp", "gif", "tiff", "ppm")] + ["CMYK.JPEG"]
    for name in names:
        (root / "ant" / name).write_bytes(name.encode())
    (root / "ant" / "notes.txt").write_text("not a picture")
    (root / "ant" / ".hidden.png").write_text("not a picture")
    (root / ".git").mkdir()
    classes, samples = read(root)
    assert samples == [(n.encode(), 0) for n in sorted(names)] + [(p, 2) for p in PICTURES[1:3]] + [(PICTURES[0], 3)]
    assert classes == ["ant", "bat", "cow", "wolf"]
    assert read(root, 5)[1] == samples[:5]
    assert [(part.file, part.rows) for part in plan_source(describe(str(root))).parts] == [(0, 2)] * 4 + [(2, 2)]


def write_tar(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, label in enumerate(labels):
            for name, data in ((f"{number}.jpg", PICTURES[0]), (f"{number}.cls", label.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


SOURCES = {
    "table": lambda root, names: write_parquet(root / "t.parquet", PICTURES[:1] * len(names), names),
    "tar": lambda root, names: write_tar(root / "t.tar", names),
    "folder": lambda root, names: write_folder(root, **dict.fromkeys(names, PICTURES[:1])),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["wolf", "ant", "bee"], ["ant", "bee", "wolf"]),
        (["n10", "n9", "7"], ["7", "n10", "n9"]),
        ([str(number) for number in range(11, -1, -1)], [str(number) for number in range(12)]),
        (["\ufeffwolf", "ant ", " bee"], ["ant", "bee", "wolf"]),
        (["-1", "0", "1"], "label -1 is not a class"),
        (["+1", "0", "-3"], "label -3 is not a class"),
    ],
)
def test_names_have_one_rule_in_every_source(tmp_path, kind, names, expected):
    """Tars read whole numbers as labels themselves, which are the same where there is one for each class."""
    source = SOURCES[kind](tmp_path / "source", names)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            read(source)
        return
    classes, samples = read(source)
    assert (classes or expected) == expected
    assert {label for _, label in samples} == set(range(len(names)))
    if kind != "folder":
        assert [expected[label] for _, label in samples] == [name.strip("\ufeff ") for name in names]


@pytest.mark.parametrize(
    ("kind", "names", "message"),
    [
        ("table", ["a", " "], "row 1: the label is empty"),
        ("tar", ["a", "\ufeff\n"], "sample 1: the label is empty"),
        ("folder", ["a", " "], "a class has an empty name"),
        ("folder", ["a", "a "], "two classes have the name 'a'"),
    ],
)
def test_empty_and_doubled_names_are_refused(tmp_path, kind, names, message):
    with pytest.raises(InputError, match=message):
        read(SOURCES[kind](tmp_path / "source", names))


def test_names_that_a_data_set_has_numbered_are_checked_too(tmp_path, hf_rows):
    hf_rows.to_parquet(tmp_path / "t.parquet")
    table = pq.read_table(tmp_path / "t.parquet")
    metadata = table.schema.metadata[b"huggingface"]
    for name, message in (
        (b'"zebra"', "two classes have the name 'zebra'"),
        (b'" "', "a class has an empty name"),
        (b"4", ""),
    ):
        changed = table.replace_schema_metadata({b"huggingface": metadata.replace(b'"ant"', name)})
        pq.write_table(changed, tmp_path / "t.parquet")
        if message:
            with pytest.raises(InputError, match=f"column 'label': {message}"):
                read(tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet")[0] == ["zebra", "4", "cow"]


def test_a_folder_of_links_is_the_folder_they_lead_to(tmp_path):
    real = write_folder(tmp_path / "real", dog=PICTURES[:2], cat=PICTURES[2:4])
    (tmp_path / "links").mkdir()
    for name in ("dog", "cat"):
        (tmp_path / "links" / name).symlink_to(f"../real/{name}")
    for name, target in (("loop", "."), ("up", ".."), ("dog/back", "../../real")):
        (tmp_path / "links" / name).symlink_to(target)
    assert read(tmp_path / "links") == read(tmp_path / "links", format="imagefolder") == read(real)
    assert sorted(read(tmp_path / "links", label_column="none")[1]) == sorted((p, 0) for p in PICTURES[:4])
    write_parquet(tmp_path / "tables" / "t.parquet", PICTURES[:2], [0, 1])
    (tmp_path / "tables" / "again").symlink_to(".")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "tables").symlink_to("../tables")
    assert read(tmp_path / "linked")[1] == [(PICTURES[0], 0), (PICTURES[1], 1)]


def test_folders_inside_a_class_belong_to_it_unless_it_is_none(tmp_path):
    root = write_folder(tmp_path / "d", ant=PICTURES[:1], bee=[])
    write_folder(root / "bee" / "more", deep=PICTURES[1:2])
    assert read(root) == (["ant", "bee"], [(PICTURES[0], 0), (PICTURES[1], 1)])
    for name in ("train", "val"):
        write_folder(tmp_path / "splits" / name, ant=PICTURES[:1])
    with pytest.raises(InputError, match=r"train/ant: is a folder inside a class, .*; perhaps .*/splits/train is the"):
        read(tmp_path / "splits")


def test_what_is_left_out_is_counted(tmp_path):
    root = write_folder(tmp_path / "d", ant=PICTURES[:1])
    for name in ("beside.PNG", "beside.jfif", "notes.txt", "LICENSE", ".hidden.jpg", "ant/0.jpg.0123", "ant/more.eps"):
        (root / name).write_bytes(b"text")
    assert plan_source(describe(str(root))).left_out == {
        "an image beside the classes' folders": 2, "not an image (.txt)": 1, "not an image (no extension)": 1,
        "hidden, its name begins with a dot": 1, "not an image (another extension)": 1, "not an image (.eps)": 1,
    }  # fmt: skip
    table = tmp_path / "t"
    for name in ("_log/0.parquet", "part.parquet", "_old.parquet"):
        write_parquet(table / name, PICTURES[:1], [0])
    for name in ("_SUCCESS", ".part.crc", "README.md"):
        (table / name).touch()
    plan = plan_source(describe(str(table)))
    assert [Path(file["name"]).name for file in plan.files] == ["part.parquet"]
    private = "private, a name begins with _ or cache-"
    assert plan.left_out == {private: 3, "hidden, its name begins with a dot": 1, "not parquet (.md)": 1}


def test_digits_are_those_of_scikit_learn(monkeypatch):
    from sklearn.datasets import load_digits

    monkeypatch.setattr(parts, "PART", 500)
    digits = load_digits()
    classes, samples = read("digits")
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image))) for image, _ in samples])
    assert np.array_equal(pixels, np.round(digits.images * 255 / 16))
    assert [label for _, label in samples] == digits.target.tolist()
    assert classes == list("0123456789")
    assert read("digits", label_column="none")[0] == ["all"]


# --- a source that changes -----------------------------------------------------------------------------------------


def parquet(path, images=PICTURES):
    return write_parquet(path / "t.parquet", images, [0] * len(images), row_group_size=2)


def arrow(path, images=PICTURES):
    with pa.ipc.new_stream(str(path / "t.arrow"), IMAGES_AND_LABELS) as writer:
        writer.write_table(pa.table([images, [0] * len(images)], schema=IMAGES_AND_LABELS))
    return path / "t.arrow"


IMAGES_AND_LABELS = pa.schema({"image": pa.binary(), "label": pa.int64()})


def picture_folder(path):
    return write_folder(path / "pictures", a=PICTURES[:3], b=PICTURES[3:])


def saved(path, images=PICTURES):
    import datasets

    datasets.Dataset.from_dict({"image": images, "label": [0] * len(images)}).cast_column(
        "image", datasets.Value("binary")
    ).save_to_disk(path / "saved")
    return path / "saved"


@pytest.mark.parametrize("make", [parquet, arrow, picture_folder, saved])
@pytest.mark.parametrize("change", ["cut", "touched", "gone"])
def test_a_file_that_changed_since_the_plan_is_refused(tmp_path, small_parts, make, change):
    source = make(tmp_path)
    description = describe(str(source))
    plan = plan_source(description)
    path = source if source.is_file() else next(f for f in sorted(source.rglob("*")) if f.suffix in (".jpg", ".arrow"))
    if change == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif change == "touched":
        os.utime(path, (1, 1))
    else:
        path.unlink()
    named = path.parent if make is picture_folder else path
    with pytest.raises(InputError, match=f"{named}.*: changed since the conversion began|{path}: cannot be read"):
        list(read_part(description, plan, plan.parts[0]))
    if make is not picture_folder:
        return
    assert len(list(read_part(description, plan, plan.parts[-1]))) == 2  # of another folder, which is as it was


@pytest.mark.parametrize("make", [parquet, arrow, saved])
def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path, make):
    """Read on, a file that is mapped into memory would end the process."""
    source = make(tmp_path, [b"x" * 5000] * 200)
    description = describe(str(source))
    plan = plan_source(description)
    path = source if source.is_file() else next(source.glob("*.arrow"))
    samples = read_part(description, plan, plan.parts[0])
    next(samples)
    os.truncate(path, 100)
    with pytest.raises(InputError, match=f"{path}: changed since the conversion began .bytes: .* then, 100 now"):
        list(samples)


# --- bad input -----------------------------------------------------------------------------------------------------


def no_such_file(tmp_path):
    return tmp_path / "nowhere" / "t.parquet", {}, ["nowhere/t.parquet: no such file or folder"]


def no_such_folder(tmp_path):
    return tmp_path / "nowhere", {"format": "imagefolder"}, ["nowhere", "no such folder"]


def glob_without_match(tmp_path):
    return f"{tmp_path}/*.parquet", {}, ["*.parquet", "found no"]


def empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty", {}, ["empty", "found no Parquet file, Arrow file, tar or image"]


def folder_of_another_format(tmp_path):
    return write_folder(tmp_path / "d", a=PICTURES), {"format": "arrow"}, ["holds no arrow file"]


def two_formats(tmp_path):
    write_folder(tmp_path / "d", a=PICTURES)
    write_parquet(tmp_path / "d" / "t.parquet", PICTURES[:1], [0])
    return tmp_path / "d", {}, ["imagefolder (6 files) and parquet (1 files)", "--format"]


def single_picture(tmp_path):
    return write_folder(tmp_path / "d", a=PICTURES) / "a" / "0.jpg", {}, ["single image; give the folder"]


def pictures_without_classes(tmp_path):
    return write_folder(tmp_path / "d", a=PICTURES) / "a", {}, ["no ROOT/CLASS/IMAGE", "--label-column none"]


def folder_of_splits(tmp_path):
    write_folder(tmp_path / "d" / "train", a=PICTURES)
    return tmp_path / "d", {}, ["train/a: is a folder inside a class"]


def corrupt_parquet(tmp_path):
    path = write_parquet(tmp_path / "d" / "t.parquet", PICTURES, [0] * 6)
    path.write_bytes(path.read_bytes()[:-40])
    return path, {}, ["cannot be read", "t.parquet"]


def corrupt_page(tmp_path):
    path = write_parquet(tmp_path / "t.parquet", PICTURES, [0] * 6, write_page_checksum=True, compression="none")
    data = bytearray(path.read_bytes())
    data[data.index(PICTURES[2]) + 5] ^= 1
    path.write_bytes(data)
    return path, {}, ["cannot be read", "t.parquet"]


def truncated_arrow(tmp_path):
    path = arrow(tmp_path)
    os.truncate(path, path.stat().st_size * 2 // 3)
    return path, {}, ["cannot be read", "t.arrow"]


def zero_byte_table(tmp_path):
    (tmp_path / "t.arrow").touch()
    return tmp_path / "t.arrow", {}, ["cannot be read", "t.arrow"]


def no_such_column(tmp_path):
    write_parquet(tmp_path / "d" / "a.parquet", PICTURES, [0] * 6)
    pq.write_table(pa.table({"image": [{"bytes": PICTURES[0]}], "class": [0]}), tmp_path / "d" / "b.parquet")
    return tmp_path / "d", {}, ["b.parquet: has no column 'label'", "'image', 'image.bytes', 'class'"]


def image_column_of_text(tmp_path):
    pq.write_table(pa.table({"image": ["0.jpg"], "label": [0]}), tmp_path / "t.parquet")
    return tmp_path / "t.parquet", {}, ["column 'image'", "is string, expected the bytes"]


def bad_labels(labels, *messages):
    def case(tmp_path):
        return write_parquet(tmp_path / "t.parquet", PICTURES[: len(labels)], labels), {}, messages

    return case


def classes_differ(tmp_path):
    write_parquet(tmp_path / "d" / "a.parquet", PICTURES[:1], [0])
    write_parquet(tmp_path / "d" / "b.parquet", PICTURES[:1], ["ant"])
    return tmp_path / "d", {}, ["other classes than", "b.parquet"]


def column_of_a_folder(tmp_path):
    return write_folder(tmp_path / "d", a=PICTURES), {"image_column": "x"}, ["columns are for tables"]


def split_of_a_file(tmp_path):
    return write_parquet(tmp_path / "t.parquet", PICTURES, [0] * 6), {"split": "test"}, ["--split"]


@pytest.mark.parametrize(
    "case",
    [
        no_such_file,
        no_such_folder,
        glob_without_match,
        empty_folder,
        folder_of_another_format,
        two_formats,
        single_picture,
        pictures_without_classes,
        folder_of_splits,
        corrupt_parquet,
        corrupt_page,
        truncated_arrow,
        zero_byte_table,
        no_such_column,
        image_column_of_text,
        pytest.param(bad_labels([0, 1, -1], "t.parquet row 2", "label -1"), id="negative_label"),
        pytest.param(bad_labels([0, None, 1], "t.parquet row 1", "null"), id="null_label"),
        pytest.param(bad_labels(["a", None], "t.parquet row 1", "null"), id="null_name"),
        pytest.param(bad_labels([0.0, 1.0], "integers or strings", "double"), id="float_label"),
        pytest.param(bad_labels([True, False], "integers or strings", "bool"), id="bool_label"),
        pytest.param(bad_labels([0, 2**62], "t.parquet row 1", str(2**62)), id="huge_label"),
        pytest.param(bad_labels(pa.array([2**64 - 1], pa.uint64()), "row 0", str(2**64 - 1)), id="label_beyond_int64"),
        classes_differ,
        column_of_a_folder,
        split_of_a_file,
    ],
)
def test_a_bad_source_is_refused_in_one_line(tmp_path, case):
    source, options, messages = case(tmp_path)
    with pytest.raises(InputError) as raised:
        read(source, **options)
    assert len(str(raised.value).splitlines()) == 1
    for message in messages:
        assert message in str(raised.value)


def test_a_null_picture_is_left_to_who_decodes(tmp_path):
    path = write_parquet(tmp_path / "t.parquet", [None, b"", PICTURES[0]], [0, 1, 2])
    assert [image for image, _ in read(path)[1]] == [None, b"", PICTURES[0]]


def test_a_table_without_rows_has_no_parts(tmp_path):
    path = write_parquet(tmp_path / "t.parquet", [], pa.array([], pa.int64()))
    assert plan_source(describe(str(path))).parts == []


@pytest.mark.parametrize("source", ["nowhere/t.parquet", "nowhere", "nowhere/*.tar"])
def test_a_mistyped_path_waits_for_no_library(tmp_path, source):
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-c",
        f"from convert.sources import registry; registry.describe({source!r}, 'parquet')",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert b"InputError" in done.stderr
    lines = done.stderr.decode().splitlines()
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines if "|" in line}
    assert "convert" in loaded
    assert not loaded & {"streaming", "torch", "datasets", "pyarrow", "sklearn", "numpy", "boto3", "PIL", "tqdm"}
