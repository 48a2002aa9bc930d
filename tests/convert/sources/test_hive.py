"""Columns in the names of folders, as pyarrow writes them."""

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from convert.sources import parts
from convert.sources.registry import InputError, describe
from tests.helpers.sources import read_source, write_parquet

IMAGES = [b"%d" % k for k in range(6)]


@pytest.mark.parametrize("format", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([2, 0, 2, 0, 0, 2], ["0", "1", "2"]),
        (["ねこ", "bär", "a=b/c", "100%", "ねこ", "bär"], ["100%", "a=b/c", "bär", "ねこ"]),
        (["1", "x", "1", "x", "x", "1"], ["1", "x"]),
    ],
)
def test_labels_are_read_from_what_pyarrow_writes(tmp_path, monkeypatch, format, labels, classes):
    monkeypatch.setattr(parts, "PART", 1)
    table = pa.table({"image": IMAGES, "label": labels, "split": ["train"] * 6})
    ds.write_dataset(table, tmp_path / "d", format=format, partitioning=["split", "label"], partitioning_flavor="hive")
    found, samples = read_source(tmp_path / "d")
    assert found == classes
    assert sorted(samples) == sorted(zip(IMAGES, map(classes.index, map(str, labels)), strict=True))
    one = next((tmp_path / "d").glob("*/*/*"))  # alone, its folder is read likewise
    assert {image for image, _ in read_source(one, format=format)[1]} < set(IMAGES)


def test_a_schema_may_name_the_classes_that_folders_number(tmp_path):
    note = b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["wolf", "ant"]}}}}'
    table = pa.table({"image": IMAGES[:2]}).replace_schema_metadata({"huggingface": note})
    (tmp_path / "label=1").mkdir()
    pq.write_table(table, tmp_path / "label=1" / "t.parquet")
    assert read_source(tmp_path) == (["wolf", "ant"], [(IMAGES[0], 1), (IMAGES[1], 1)])
    (tmp_path / "label=1").rename(tmp_path / "label=2")
    with pytest.raises(InputError, match=r"label=2/t\.parquet row 0: label 2 is not a class, expected 0 to 1"):
        read_source(tmp_path)


def test_a_null_is_refused_and_a_missing_column_told_with_those_of_the_folders(tmp_path):
    for name in ("label=0", "label=__HIVE_DEFAULT_PARTITION__"):
        (tmp_path / "d" / name).mkdir(parents=True)
        pq.write_table(pa.table({"image": IMAGES}), tmp_path / "d" / name / "t.parquet")
    with pytest.raises(InputError, match=r"label=__HIVE_DEFAULT_PARTITION__/t\.parquet row 0: the label is null"):
        read_source(tmp_path / "d")
    (tmp_path / "e" / "kind=a").mkdir(parents=True)
    pq.write_table(pa.table({"image": IMAGES}), tmp_path / "e" / "kind=a" / "t.parquet")
    with pytest.raises(InputError, match="has no column 'label'; its columns are: 'image', 'kind'"):
        read_source(tmp_path / "e")
    assert read_source(tmp_path / "e", label_column="kind")[0] == ["a"]


def test_a_column_of_the_file_counts_before_its_folders(tmp_path):
    write_parquet(tmp_path / "label=7" / "t.parquet", IMAGES, [0, 1, 0, 1, 0, 1])
    assert read_source(tmp_path)[0] == ["0", "1"]


def test_only_a_column_named_split_holds_splits(tmp_path):
    for name in ("label=bullet_train/x", "label=acid_test/x"):
        write_parquet(tmp_path / "a" / f"{name}.parquet", IMAGES, [0] * 6)
    assert len(read_source(tmp_path / "a")[1]) == 12
    for name in ("split=train/x", "split=test/x"):
        write_parquet(tmp_path / "b" / f"{name}.parquet", IMAGES, [0] * 6)
    with pytest.raises(InputError, match=r"several splits \(test, train\)"):
        describe(str(tmp_path / "b"))
