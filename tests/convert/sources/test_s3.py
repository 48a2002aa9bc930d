"""Sources in an object store: a real one on loopback, and one whose network fails."""

import io
import random
import re
import tarfile
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from convert.sources import parts
from convert.sources import s3 as remote
from convert.sources.registry import InputError, describe, plan_source, read_part
from tests.helpers.fault_proxy import FaultProxy

IMAGES = [random.Random(k).randbytes(2000 + k) for k in range(200)]
LABELS = [k % 7 for k in range(200)]


@pytest.fixture
def put(s3):
    """Puts an object into the bucket."""
    return lambda key, body: s3.client.put_object(Bucket="sit", Key=key, Body=body)


def table(labels=LABELS, images=IMAGES):
    return pa.table({"image": images, "label": labels})


def as_parquet(table, **options):
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def as_arrow(table, make):
    file = io.BytesIO()
    with make(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return file.getvalue()


def as_tar(labels, mode="w"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for number, label in enumerate(labels):
            for extension, data in (("jpg", IMAGES[number]), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{number:03}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def read(source, limit=None, **options):
    """The classes, and (image, label) of every sample, part by part."""
    description = describe(source, **options)
    plan = plan_source(description, limit)
    assert plan == plan_source(description, limit)
    return plan.classes, [(s.image, s.label) for part in plan.parts for s in read_part(description, plan, part)]


def test_tables_in_s3(put, monkeypatch):
    monkeypatch.setattr(parts, "PART", 10)
    both = list(zip(IMAGES, LABELS, strict=True))
    put("d/b.parquet", as_parquet(table(), row_group_size=9))
    put("d/a/train-z.parquet", as_parquet(table(LABELS[:3], IMAGES[:3])))
    put("d/.hidden.parquet", b"")
    put("d/_metadata.parquet", b"")
    put("dd/c.parquet", b"")  # of another prefix
    put("arrow/file.arrow", as_arrow(table(), pa.ipc.new_file))
    put("arrow/stream.arrow", as_arrow(table(), pa.ipc.new_stream))
    put("names/t.arrow", as_arrow(table(["wolf", "ant"], IMAGES[:2]), pa.ipc.new_stream))

    assert read("s3://sit/d/") == (list("0123456"), both[:3] + both)
    assert read("s3://sit/d/b.parquet", 25) == (list("0123456"), both[:25])
    assert read("s3://sit/d/[a-z]*.parquet")[1] == both
    assert read("s3://sit/d/**/[a-z]*.parquet")[1] == both[:3] + both
    assert read("s3://sit/*/a/train*")[1] == both[:3]
    assert read("s3://sit/arrow/file.arrow") == (list("0123456"), both)
    assert len(plan_source(describe("s3://sit/arrow/file.arrow")).parts) == 15
    # A stream is read once: its integers are known when it has been.
    assert read("s3://sit/arrow/stream.arrow") == (None, both)
    assert read("s3://sit/arrow", 210) == (None, both + both[:10])
    assert plan_source(describe("s3://sit/arrow"), 210).parts[-1].rows == 10
    assert read("s3://sit/names", format="arrow") == (["ant", "wolf"], [(IMAGES[0], 1), (IMAGES[1], 0)])
    assert read("s3://sit/names", label_column="none") == (["all"], [(IMAGES[0], 0), (IMAGES[1], 0)])
    put("tars/0.tar", as_tar(LABELS))
    put("tars/1.tar.gz", as_tar(LABELS[:2], "w:gz"))
    put("names/2.tar", as_tar(["wolf", "ant"]))
    assert read("s3://sit/tars") == (None, both + both[:2])
    assert read("s3://sit/tars", 201) == (None, both + both[:1])
    assert read("s3://sit/names/*.tar") == (["ant", "wolf"], [(IMAGES[0], 1), (IMAGES[1], 0)])
    description = describe("s3://sit/d/b.parquet")
    assert description["path"] == "s3://sit/d/b.parquet"
    file = plan_source(description).files[0]
    assert (file["name"], file["bytes"]) == ("s3://sit/d/b.parquet", len(as_parquet(table(), row_group_size=9)))


def test_keys_with_signs_of_globs_are_meant_as_they_are_spelled(put):
    put("d[1]/a[2]/x.parquet", as_parquet(table(LABELS[:2], IMAGES[:2])))
    put("d[1]/a2/y.parquet", as_parquet(table(LABELS[:3], IMAGES[:3])))
    put("d[1]/_delta_log/0.parquet", b"")
    two, three = (list(zip(IMAGES[:n], LABELS[:n], strict=True)) for n in (2, 3))
    assert read("s3://sit/d[1]")[1] == three + two
    assert read("s3://sit/d[1]/a[2]/x.parquet")[1] == read("s3://sit/d[1]/a[2]/*")[1] == two
    assert read("s3://sit/d[1]/a[0-9]/*.parquet")[1] == three
    put("h/label=%C3%BC/x.parquet", as_parquet(table(LABELS[:2], IMAGES[:2]).drop_columns("label")))
    assert read("s3://sit/h") == (["ü"], [(IMAGES[0], 0), (IMAGES[1], 0)])


def test_a_large_object_is_not_held_in_memory(put, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK", 1 << 20)
    images = [random.Random(k).randbytes(100_000) for k in range(300)]
    large = pa.table({"image": images, "label": [0] * 300})
    put("t.parquet", as_parquet(large, use_dictionary=False, write_batch_size=4))
    put("t.arrow", as_arrow(large, pa.ipc.new_stream))
    for name in ("t.parquet", "t.arrow"):
        description = describe(f"s3://sit/{name}")
        plan = plan_source(description)
        assert len(plan.parts) == 1
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        held = [
            pa.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[0]
            for _ in read_part(description, plan, plan.parts[0])
        ]
        tracemalloc.stop()
        assert len(held) == 300
        assert max(held) < 20_000_000  # of 30: some copies of 64 rows, or of a batch of 7


def test_what_is_wrong_with_a_source_in_s3(put, monkeypatch):
    put("mixed/test-0.parquet", as_parquet(table()))
    put("mixed/train-0.parquet", as_parquet(table()))
    put("mixed/x.arrow", b"")
    put("pictures/ant/1.jpg", b"")
    put("cut/t.parquet", as_parquet(table())[:-10])
    put("labels/t.arrow", as_arrow(table([*LABELS[:-1], -5]), pa.ipc.new_stream))
    put("labels/null.arrow", as_arrow(table([*LABELS[:-1], None]), pa.ipc.new_stream))
    put(
        "path/t.parquet", as_parquet(pa.table({"image": [{"bytes": None, "path": "x.jpg"}], "label": [0]}).cast(STRUCT))
    )
    for source, options, message in (
        (
            "s3://sit/no.prefix/none.parquet",
            {},
            r"s3://sit/no\.prefix/none\.parquet: no such object, and none below it",
        ),
        ("s3://sit/none/", {}, "s3://sit/none: found no Parquet file"),
        ("s3://sit/d/*.parquet", {}, "s3://sit/d/[*].parquet: no such object"),
        ("s3://no-such-bucket/x.parquet", {}, "s3://no-such-bucket/x.parquet: .*bucket does not exist"),
        ("s3://sit/mixed", {}, r"arrow \(1 files\) and parquet \(2 files\); choose with --format"),
        ("s3://sit/mixed", {"format": "parquet"}, r"several splits \(test, train\); give a glob"),
        ("s3://sit/pictures", {}, "is read as imagefolder, expected parquet, arrow, webdataset for s3://"),
        ("s3://sit/mixed", {"format": "hf"}, "is read as hf, expected parquet, arrow, webdataset for s3://"),
        ("s3://sit/cut/t.parquet", {}, "s3://sit/cut/t.parquet: cannot be read: Parquet magic bytes not found"),
        ("s3://sit/labels/t.arrow", {}, "labels/t.arrow row 199: label -5 is not a class"),
        ("s3://sit/labels/null.arrow", {}, "labels/null.arrow row 199: the label is null"),
        (
            "s3://sit/path/t.parquet",
            {},
            "path/t.parquet row 0: 'x.jpg': a file instead of an image's bytes",
        ),
        ("s3://", {"format": "parquet"}, "expected s3://BUCKET/KEY"),
        ("s3://key:secret@bucket/t.parquet", {}, "credentials come from the environment"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            read(source, **options)
        assert "secret" not in str(raised.value)
        assert len(str(raised.value).splitlines()) == 1
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(InputError, match=r"s3://sit/mixed: cannot be read: .*ACCESS_DENIED"):
        read("s3://sit/mixed")


STRUCT = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()})


def test_an_object_that_changed_since_the_plan_is_refused(put):
    put("t.parquet", as_parquet(table()))
    description = describe("s3://sit/t.parquet")
    plan = plan_source(description)
    samples = read_part(description, plan, plan.parts[0])
    next(samples)
    put("t.parquet", as_parquet(table(LABELS[:9], IMAGES[:9])))
    for rest in (samples, read_part(description, plan, plan.parts[0])):
        with pytest.raises(InputError, match=r"s3://sit/t\.parquet: changed since the conversion began"):
            list(rest)


@pytest.mark.parametrize("kind", ["parquet", "file", "stream", "tar", "tar.gz"])
def test_a_store_that_fails_is_tried_again_and_then_named(put, s3, monkeypatch, kind):
    monkeypatch.setattr(remote, "LEAST", 10_000)
    monkeypatch.setattr(remote, "CHUNK", 20_000)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    data = (
        as_parquet(table(), use_dictionary=False, compression="none", data_page_size=9000, write_batch_size=4)
        if kind == "parquet"
        else None
    )
    if kind.startswith("tar"):
        data = as_tar(LABELS, "w:gz" if kind == "tar.gz" else "w")
    data = data or as_arrow(table(), pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)
    uri = f"s3://sit/t.{kind}"
    put(f"t.{kind}", data)
    with FaultProxy(s3.url) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
        description = describe(uri, "arrow" if kind in ("file", "stream") else None)
        plan = plan_source(description)
        for fault, after in (("503", 0), ("cut", 500)):
            proxy.fault(fault, f"GET /sit/t.{kind}", times=2, after=after)
            samples = [(s.image, s.label) for s in read_part(description, plan, plan.parts[0])]
            assert samples == list(zip(IMAGES, LABELS, strict=True))
            assert proxy.faults[-1].met == 2
            proxy.heal()
        for fault in ("503", "cut"):
            samples = read_part(description, plan, plan.parts[0])
            next(samples)
            proxy.fault(fault, f"GET /sit/t.{kind}", after=500)
            with pytest.raises(InputError, match=f"{re.escape(uri)}: cannot be read: .*AWS Error"):
                list(samples)
            proxy.heal()
