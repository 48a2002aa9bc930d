"""Tables as other tools write them: what schemas say, the types of columns, and files without rows."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from convert.sources.registry import InputError, describe
from tests.helpers.sources import read_source, write_parquet

IMAGES = [b"one", b"two", b"three"]


def with_schema(path, metadata, labels=(0, 1, 0)):
    """A table whose schema has this text as the note of `datasets`."""
    table = pa.table({"image": IMAGES, "label": list(labels)})
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), path)
    return path


def feature(**content):
    return json.dumps({"info": {"features": {"label": {"_type": "ClassLabel", **content}}}})


@pytest.mark.parametrize(
    "metadata",
    [
        *(b"", b"{", b"\xff\xfe", b"null", b"[]", b'"info"', b"3", b'{"info": null}', b'{"info": {"features": []}}'),
        *(b'{"info": {"features": {"label": [1]}}}', b"[" * 100_000, b'{"info": {"features": {"label": "text"}}}'),
        *(feature(), feature(names=None), feature(names=3), feature(names="ab"), feature(names=[])),
        feature(names={"a": "b"}),
    ],
    ids=lambda text: text[:60],
)
def test_a_schema_without_names_of_classes_is_no_obstacle(tmp_path, metadata):
    assert read_source(with_schema(tmp_path / "t.parquet", metadata))[0] == ["0", "1"]


@pytest.mark.parametrize("names", [[4, 5, 6], ["4", 5, "6"], {"0": 4, "1": 5, "2": 6}])
def test_whole_numbers_are_names_of_classes(tmp_path, names):
    assert read_source(with_schema(tmp_path / "t.parquet", feature(names=names)))[0] == ["4", "5", "6"]


@pytest.mark.parametrize("name", [None, False, 1.5, ["a"], {"a": 1}])
def test_other_names_are_refused_before_any_row_is_read(tmp_path, name):
    path = with_schema(tmp_path / "t.parquet", feature(names=["a", name]))
    with pytest.raises(InputError, match=r"column 'label': has a class named .*, expected text; give .* --class-names"):
        read_source(path)


def test_strings_that_are_no_names_of_the_schema_are_classes_of_their_own(tmp_path):
    path = with_schema(tmp_path / "t.parquet", feature(names=["wolf", "ant"]), ["ant", "wolf", "ant"])
    assert read_source(path) == (["wolf", "ant"], list(zip(IMAGES, [1, 0, 1], strict=True)))
    path = with_schema(tmp_path / "t.parquet", feature(names=["x", "y"]), ["ant", "wolf", "ant"])
    assert read_source(path) == (["ant", "wolf"], list(zip(IMAGES, [0, 1, 0], strict=True)))


@pytest.mark.parametrize("layout", ["parquet", "file", "stream"])
@pytest.mark.parametrize("in_struct", [False, True])
def test_columns_of_views_are_read(tmp_path, layout, in_struct):
    images = pa.array(IMAGES, pa.binary_view())
    if in_struct:
        images = pa.StructArray.from_arrays([images, pa.array(["x"] * 3, pa.string_view())], ["bytes", "path"])
    boxes = pa.array([[1], [], [2, 3]], pa.list_view(pa.int8()))
    labels = pa.array(["wolf", "ant", "wolf"], pa.string_view())
    if layout != "parquet":  # as Polars writes its categories
        kinds = pa.array(["ant", "wolf"], pa.string_view())
        labels = pa.DictionaryArray.from_arrays(pa.array([1, 0, 1], pa.uint32()), kinds)
    table = pa.table({"boxes": boxes, "image": images, "label": labels})
    path = tmp_path / f"t.{'parquet' if layout == 'parquet' else 'arrow'}"
    if layout == "parquet":
        pq.write_table(table, path)
    else:
        with {"file": pa.ipc.new_file, "stream": pa.ipc.new_stream}[layout](str(path), table.schema) as writer:
            writer.write_table(table)
    assert read_source(path) == (["ant", "wolf"], list(zip(IMAGES, [1, 0, 1], strict=True)))


def test_files_without_rows_add_nothing_whatever_their_columns(tmp_path):
    write_parquet(tmp_path / "d" / "0.parquet", IMAGES, ["ant", "wolf", "ant"])
    pq.write_table(pa.table({"image": pa.nulls(0), "label": pa.nulls(0)}), tmp_path / "d" / "1.parquet")
    pq.write_table(pa.table({"x": pa.array([], pa.int8())}), tmp_path / "d" / "2.parquet")
    assert read_source(tmp_path / "d") == (["ant", "wolf"], list(zip(IMAGES, [0, 1, 0], strict=True)))
    arrow = tmp_path / "e" / "0.arrow"
    arrow.parent.mkdir()
    for name, table in (("0", pa.table({"image": IMAGES, "label": [0, 1, 1]})), ("1", pa.table({"x": pa.nulls(0)}))):
        with pa.ipc.new_file(str(arrow.with_stem(name)), table.schema) as writer:
            writer.write_table(table)
    assert read_source(arrow.parent)[1] == list(zip(IMAGES, [0, 1, 1], strict=True))


def test_a_column_of_nulls_is_told_by_row_or_left_to_who_decodes(tmp_path):
    pq.write_table(pa.table({"image": pa.nulls(2), "label": [0, 1]}), tmp_path / "t.parquet")
    assert read_source(tmp_path / "t.parquet")[1] == [(None, 0), (None, 1)]
    pq.write_table(pa.table({"image": IMAGES[:2], "label": pa.nulls(2)}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="row 0: the label is null"):
        read_source(tmp_path / "t.parquet")


def test_columns_are_told_with_quotes_and_twice_is_told_as_such(tmp_path):
    pq.write_table(pa.table({"image": IMAGES, "label ": [0, 1, 2]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="has no column 'label'; its columns are: 'image', 'label '"):
        read_source(tmp_path / "t.parquet")
    assert read_source(tmp_path / "t.parquet", label_column="label ")[0] == ["0", "1", "2"]
    double = pa.Table.from_arrays([pa.array(IMAGES), *[pa.array([0, 1, 2])] * 4], ["image", "label", "label", "x", "x"])
    pq.write_table(double, tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t\.parquet: has two columns 'label', expected one"):
        read_source(tmp_path / "t.parquet")
    pq.write_table(double.remove_column(1), tmp_path / "t.parquet")
    assert read_source(tmp_path / "t.parquet")[1] == list(zip(IMAGES, [0, 1, 2], strict=True))


def test_feathers_first_version_is_told(tmp_path):
    (tmp_path / "t.feather").write_bytes(b"FEA1" + bytes(60) + b"FEA1")
    with pytest.raises(InputError, match=r"t\.feather: is of Feather's version 1, expected version 2; write it again"):
        read_source(tmp_path / "t.feather")


def test_folders_of_programs_are_left_out(tmp_path):
    write_parquet(tmp_path / "part-0.parquet", IMAGES, [0, 1, 0])
    for name in ("_delta_log/0.checkpoint", "a/_temporary/0/part-0", "_metadata", "_x/y/z"):
        write_parquet(tmp_path / f"{name}.parquet", [b"no"], [9])
    write_parquet(tmp_path / "_col=1" / "part-1.parquet", [b"yes"], [1])  # a column's folder, as Spark has it
    assert [image for image, _ in read_source(tmp_path)[1]] == [b"yes", *IMAGES]


def test_paths_with_signs_of_globs_are_meant_as_they_are_spelled(tmp_path):
    folder = tmp_path / "a[1] *?"
    write_parquet(folder / "x[2].parquet", IMAGES, [0, 1, 0])
    write_parquet(folder / "y" / "x2.parquet", IMAGES[:1], [0])
    both = list(zip(IMAGES, [0, 1, 0], strict=True))
    assert read_source(folder / "x[2].parquet")[1] == both
    assert read_source(folder)[1] == [*both, (IMAGES[0], 0)]
    assert read_source(folder / "x*.parquet")[1] == both
    assert read_source(folder / "**" / "x[0-9].parquet")[1] == [(IMAGES[0], 0)]
    with pytest.raises(InputError, match=r"expected a path without \*, \? and \[, which `datasets` reads as a glob"):
        describe(str(folder), "hf")
