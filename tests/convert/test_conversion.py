"""A conversion part by part: stopped anywhere, it goes on, and its bytes are those of one that wasn't."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from sit_composer import storage
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.images import png
from tests.helpers.paths import ROOT
from tests.helpers.shards import contents, read
from tests.helpers.tables import ROWS

from convert.engine import output  # isort: skip
from convert.engine import decoders  # isort: skip
from convert.engine import pipeline  # isort: skip
from convert.kinds import pixels  # isort: skip
from convert.engine import shards  # isort: skip
from convert.sources import parts  # isort: skip
from convert.sources.parts import InputError  # isort: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Parts of 25 pictures, shards of about ten."""
    monkeypatch.setattr(parts, "PART", 25)
    monkeypatch.setattr(shards, "SHARD_BYTES", 3000)


@pytest.fixture
def whole(tmp_path, table, convert):
    """The bytes of an undisturbed conversion in this process alone."""
    assert convert(table, "--out", tmp_path / "whole", "--workers", 0)[0] == 0
    return contents(tmp_path / "whole")


def finished(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("part.*.json"))


def test_parts_have_shards_of_their_own_and_all_samples(tmp_path, whole):
    names = [name for name in whole if name.endswith(".mds")]
    assert {name.split(".")[1] for name in names} == {f"{part:05}" for part in range(24)}
    assert sorted({*whole} - {*names}) == ["index.json", "spec.json"]
    spec, samples = read(tmp_path / "whole")
    digits = load_digits()
    assert [label for _, label in samples] == digits.target[:ROWS].tolist()
    assert spec.samples == ROWS


@pytest.mark.parametrize("workers", [1, 3])
def test_the_bytes_are_the_same_whatever_the_workers(tmp_path, table, convert, whole, workers):
    code, _, stderr = convert(table, "--out", tmp_path / "out", "--workers", workers)
    assert code == 0, stderr
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
def test_killed_again_and_again_it_comes_to_the_same_bytes(tmp_path, table, whole):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tests.helpers.torture_convert", "6", "25", "3000", table, "--out", out]
    done = subprocess.run([*command, "--workers", "0"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [int(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("resumes:")]
    assert found == sorted(found)
    assert found[-1] > 5  # it was killed in the middle, and what was finished stayed
    assert contents(out) == whole
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


def test_finished_parts_are_not_done_again(tmp_path, table, convert, whole, monkeypatch):
    with stopped_after(5, monkeypatch):
        convert(table, "--out", tmp_path / "out", "--workers", 0)
    partial = tmp_path / "out.partial"
    assert len(finished(partial)) == 5
    assert not (partial / "index.json").exists()
    (partial / "shard.00002.00001.mds").unlink()  # one of them has lost a shard
    before = {name: os.stat(partial / name).st_mtime_ns for name in os.listdir(partial) if name.endswith(".mds")}
    time.sleep(0.05)
    code, _, stderr = convert(table, "--out", tmp_path / "out", "--workers", 0)
    assert code == 0
    assert "resumes: 4 of 24 parts, 100 images, are done" in stderr
    after = {name: os.stat(tmp_path / "out" / name).st_mtime_ns for name in before}
    again = {name.split(".")[1] for name in before if before[name] != after[name]}
    assert "00002" in again
    assert not again & {"00000", "00001", "00003", "00004"}
    assert contents(tmp_path / "out") == whole


@contextmanager
def stopped_after(count, monkeypatch):
    """The body's conversion ends, as by a SIGTERM, when that many parts are finished."""
    noted, finish_part = [], pipeline.Output.finish_part

    def note(self, record):
        finish_part(self, record)
        noted.append(record)
        if len(noted) == count:
            sys.exit(143)

    with monkeypatch.context() as context:
        context.setattr(pipeline.Output, "finish_part", note)
        with pytest.raises(SystemExit, match="143"):
            yield


def test_a_second_run_says_done_and_changes_nothing(tmp_path, table, convert, whole):
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "whole").iterdir()}
    code, stdout, _ = convert(table, "--out", tmp_path / "whole", "--workers", 2)
    assert code == 0
    assert "already converted" in stdout
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "whole").iterdir()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--limit", "300"], "limit None there, 300 now"),
        (["--image-size", "4"], "image_size None there, 4 now"),
        (["--label-column", "none"], "label_column 'label' there, None now"),
        ("touch", "the source's files have changed"),
    ],
)
@pytest.mark.parametrize("state", ["finished", "begun"])
def test_another_source_or_option_is_refused_and_named(tmp_path, table, convert, monkeypatch, change, said, state):
    copy = tmp_path / "digits.parquet"
    copy.write_bytes(table.read_bytes())
    out = tmp_path / "out"
    if state == "begun":
        with stopped_after(3, monkeypatch):
            convert(copy, "--out", out, "--workers", 0)
    else:
        assert convert(copy, "--out", out, "--workers", 0)[0] == 0
    kept = out if state == "finished" else tmp_path / "out.partial"
    before = contents(kept)
    options = [] if change == "touch" else change
    if change == "touch":
        pq.write_table(pq.read_table(copy).slice(0, 500), copy, row_group_size=25)
        said = said if state == "finished" else f"{said}: {copy} has changed"
    code, _, stderr = convert(copy, "--out", out, *options)
    assert code == 2
    assert said in stderr
    assert "--overwrite" in stderr
    assert contents(kept) == before
    code, _, stderr = convert(copy, "--out", out, *options, "--overwrite", "--workers", 0)
    assert code == 0, stderr
    assert read(out)[0].samples == (500 if change == "touch" else 300 if "--limit" in change else ROWS)
    assert sorted(os.listdir(tmp_path)) == ["digits.parquet", "out"]


def test_an_error_keeps_what_is_finished_and_skip_bad_goes_on(tmp_path, convert):
    digits = load_digits()
    images = [png((picture * 15).astype("uint8")) for picture in digits.images[:200]]
    images[130] = b"<html>404</html>"
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": images, "label": digits.target[:200]}), path, row_group_size=25)
    log = tmp_path / "log.jsonl"
    code, _, stderr = convert(path, "--out", tmp_path / "out", "--workers", 0, "--log", log)
    assert code == 2
    assert "t.parquet row 130" in stderr
    assert "--skip-bad" in stderr
    assert len(finished(tmp_path / "out.partial")) == 5
    code, stdout, stderr = convert(path, "--out", tmp_path / "out", "--skip-bad", "--log", log)
    assert code == 0
    assert "resumes: 5 of 8 parts" in stderr
    assert "199 images, 10 classes, 1 skipped" in stdout
    events = [json.loads(line) for line in log.read_text().splitlines()]
    kinds = ["start", *["part"] * 5, "error", "start", *["part"] * 3, "skipped", "end"]
    assert sorted(event["event"] for event in events) == sorted(kinds)
    skipped = next(event for event in events if event["event"] == "skipped")
    assert "row 130" in skipped["reason"]
    assert events[-1]["samples"] == 199
    assert convert(path, "--out", tmp_path / "again", "--skip-bad")[0] == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_process_that_dies_is_one_line_and_the_next_run_goes_on(tmp_path, table, convert, whole, monkeypatch):
    def kill_one(chunk, future):
        os.kill(descendants(os.getpid())[-1], signal.SIGKILL)
        return collect(chunk, future)

    collect = decoders._collect
    with monkeypatch.context() as context:
        context.setattr(decoders, "_collect", kill_one)
        code, _, stderr = convert(table, "--out", tmp_path / "out", "--workers", 1)
    assert code == 2
    assert stderr.splitlines()[-1].startswith("error: --workers: a process that decodes images was killed")
    assert convert(table, "--out", tmp_path / "out", "--workers", 1)[0] == 0
    assert contents(tmp_path / "out") == whole


def test_a_killed_conversions_processes_end_with_it(tmp_path, table):
    out = tmp_path / "out"
    pipe = tmp_path / "log"
    os.mkfifo(pipe)
    command = [sys.executable, "convert/to_mds.py", table, "--out", out, "--workers", "2", "--log", pipe]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        with open(pipe) as log:  # it has all of the table's pictures in one part, and waits for nobody
            assert json.loads(log.readline())["event"] == "start"
            deadline = time.monotonic() + 60
            while len(family := descendants(child.pid)) < 4:  # forkserver, resource tracker, two that decode
                assert child.poll() is None
                assert time.monotonic() < deadline
            child.kill()
            child.wait()
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in family):
            assert time.monotonic() < deadline, "they live on"
            time.sleep(0.05)
    finally:
        child.kill()


def descendants(pid: int) -> list[int]:
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


# --- What an S3 or a disk does wrong ---


@pytest.fixture
def proxy(s3, monkeypatch):
    """A proxy before the S3 that S3_ENDPOINT_URL names, and clients that try twice, and wait for a second only."""
    for name, value in {"CONNECT_TIMEOUT": 1, "READ_TIMEOUT": 1, "ATTEMPTS": 2}.items():
        monkeypatch.setattr(storage, name, value)
    with FaultProxy(s3.url) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.mark.parametrize("kind", ["503", "cut", "stall"])
def test_a_fault_of_s3_is_tried_again_and_then_one_line_and_the_next_run_goes_on(
    tmp_path, table, convert, whole, s3, proxy, kind
):
    once = proxy.fault(kind, "PUT .*shard.00003.00000", times=1)
    lasting = proxy.fault(kind, "PUT .*shard.00009.00000")
    code, _, stderr = convert(table, "--out", "s3://sit/c", "--workers", 0)
    assert code == 1
    assert stderr.splitlines()[-1].startswith("error: s3://sit/c/shard.00009.00000.mds: ")
    assert len(stderr.splitlines()) == 1
    assert once.met == 1
    assert lasting.met >= 2
    there = s3.contents("c")
    assert {"part.00003.json", "part.00008.json"} <= set(there)
    assert not {"part.00009.json", "index.json", "spec.json"} & set(there)
    proxy.heal()
    code, _, stderr = convert(table, "--out", "s3://sit/c", "--workers", 0)
    assert code == 0, stderr
    assert "resumes: 9 of 24 parts" in stderr
    assert s3.contents("c") == whole


@pytest.mark.slow
def test_killed_on_the_way_to_s3_it_comes_to_the_same_bytes(table, whole, s3):
    command = [sys.executable, "-m", "tests.helpers.torture_convert", "6", "25", "3000", table, "--out", "s3://sit/k"]
    done = subprocess.run([*command, "--workers", "0"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("resumes:") >= 3
    assert s3.contents("k") == whole


def test_a_shard_that_was_lost_from_s3_is_never_in_an_index(table, convert, whole, s3, monkeypatch):
    lose = iter(["c/shard.00001.00000.mds"])

    def publish(self, *args):
        for key in lose:
            s3.client.delete_object(Bucket="sit", Key=key)
        return publishing(self, *args)

    publishing = pipeline.Output.publish
    monkeypatch.setattr(pipeline.Output, "publish", publish)
    code, _, stderr = convert(table, "--out", "s3://sit/c", "--workers", 0)
    assert code == 2
    assert "s3://sit/c/shard.00001.00000.mds: has been lost since it was written" in stderr
    assert "index.json" not in s3.contents("c")
    code, _, stderr = convert(table, "--out", "s3://sit/c", "--workers", 0)
    assert code == 0, stderr
    assert "resumes: 23 of 24 parts" in stderr
    assert s3.contents("c") == whole


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(table, convert, whole, disk):
    out = disk.path / "out"
    disk.fill(60_000)
    code, _, stderr = convert(table, "--out", out, "--workers", 0)
    assert code == 1
    assert len(stderr.splitlines()) == 1
    assert "No space left on" in stderr
    assert finished(disk.path / "out.partial")
    assert not out.exists()
    disk.clear()
    code, _, stderr = convert(table, "--out", out, "--workers", 0)
    assert code == 0, stderr
    assert "resumes: " in stderr
    assert contents(out) == whole


# --- What others have there ---


def test_what_is_refused_is_left_as_it_was(tmp_path, table, convert):
    partial = tmp_path / "out.partial"
    for name in ("plan.json", "thesis.tex", "photos/a.jpg", "scratch/b.jpg"):
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_text("{}")
    before = sorted(map(str, partial.rglob("*")))
    for options in ([], ["--overwrite"]):
        code, _, stderr = convert(table, "--out", tmp_path / "out", *options)
        assert code == 2
        assert ": holds files that this program did not write" in stderr
        assert sorted(map(str, partial.rglob("*"))) == before


def test_a_conversion_named_partial_is_not_the_beginning_of_another(tmp_path, table, convert):
    assert convert(table, "--out", tmp_path / "out.partial", "--workers", 0)[0] == 0
    before = contents(tmp_path / "out.partial")
    code, _, stderr = convert(table, "--out", tmp_path / "out")
    assert code == 2
    assert "move it away" in stderr
    assert contents(tmp_path / "out.partial") == before


def test_what_was_replaced_goes_though_a_kill_left_it(tmp_path, table, convert, monkeypatch):
    def killed(path):
        raise KeyboardInterrupt

    assert convert(table, "--out", tmp_path / "out")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(output, "_remove_replaced", killed)
        assert convert(table, "--out", tmp_path / "out", "--limit", 60, "--overwrite")[0] == 130
    assert [name for name in os.listdir(tmp_path) if name.startswith("out.replaced-")]
    assert "already converted" in convert(table, "--out", tmp_path / "out", "--limit", 60)[1]
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert len(read(tmp_path / "out")[1]) == 60


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b"other"), Path.unlink])
def test_pictures_that_change_before_they_are_read_are_seen(tmp_path, convert, monkeypatch, change):
    (tmp_path / "d" / "ant").mkdir(parents=True)
    files = [png(np.full((8, 8), number, np.uint8)) for number in range(10)]
    for number, file in enumerate(files):
        (tmp_path / "d" / "ant" / f"{number}.png").write_bytes(file)

    def decoded_late(data, decoded=pixels.decoded):
        if data == files[0]:
            change(tmp_path / "d" / "ant" / "9.png")
        return decoded(data)

    monkeypatch.setattr(pixels, "decoded", decoded_late)
    code, _, stderr = convert(tmp_path / "d", "--out", tmp_path / "out", "--skip-bad")
    assert (code, f"{tmp_path}/d/ant: changed since the conversion began" in stderr) == (2, True)
    assert sorted(os.listdir(tmp_path)) == ["d"]


def test_a_folder_that_only_looks_like_a_replaced_one_stays(tmp_path, table, convert):
    (tmp_path / "out.replaced-1").mkdir()
    (tmp_path / "out.replaced-1" / "spec.json").write_text("{}")
    (tmp_path / "out.replaced-1" / "thesis.tex").write_text("{}")
    for _ in range(2):
        assert convert(table, "--out", tmp_path / "out", "--overwrite", "--workers", 0)[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["out", "out.replaced-1"]


def test_what_comes_to_lie_there_meanwhile_stays(tmp_path, table, convert, s3, monkeypatch):
    out = tmp_path / "out"
    assert convert(table, "--out", out, "--workers", 0)[0] == 0

    def publish(self, *args):
        if self.path:
            (out / "thesis.tex").write_text("mine")
        else:
            s3.client.put_object(Bucket="sit", Key="c/val/thesis.tex", Body=b"mine")
        return publishing(self, *args)

    publishing = pipeline.Output.publish
    monkeypatch.setattr(pipeline.Output, "publish", publish)
    code, _, stderr = convert(table, "--out", out, "--overwrite", "--workers", 0)
    assert code == 2
    assert "thesis.tex" in stderr
    assert (out / "thesis.tex").read_text() == "mine"
    assert convert(table, "--out", "s3://sit/c", "--workers", 0)[0] == 0
    assert s3.client.get_object(Bucket="sit", Key="c/val/thesis.tex")["Body"].read() == b"mine"


def test_saying_that_all_is_done_leaves_anothers_beginning_alone(table, convert, s3, monkeypatch):
    assert convert(table, "--out", "s3://sit/c", "--workers", 0)[0] == 0
    with stopped_after(3, monkeypatch):
        convert(table, "--out", "s3://sit/c", "--overwrite", "--limit", 300, "--workers", 0)
    before = s3.keys("c")
    assert "c/part.00002.json" in before
    code, stdout, _ = convert(table, "--out", "s3://sit/c")
    assert code == 0
    assert "already converted" in stdout
    assert s3.keys("c") == before
    code, _, stderr = convert(table, "--out", "s3://sit/c", "--overwrite", "--limit", 300, "--workers", 0)
    assert code == 0
    assert "resumes: " in stderr


def test_a_source_that_breaks_later_costs_no_part_before(tmp_path, table, convert, monkeypatch):
    read_part = pipeline.read_part

    def broken(source, plan, part):
        if part.start >= 250:
            raise InputError("it breaks")
        yield from read_part(source, plan, part)

    for workers in (0, 1):
        with monkeypatch.context() as context:
            context.setattr(pipeline, "read_part", broken)
            code, _, stderr = convert(table, "--out", tmp_path / str(workers), "--workers", workers)
        assert (code, stderr) == (2, "error: it breaks\n")
        assert len(finished(tmp_path / f"{workers}.partial")) == 10


def test_a_class_whose_name_is_not_utf8_is_one_all_the_same(tmp_path, table, convert):
    root = os.fsencode(tmp_path / "pictures")
    os.makedirs(root + b"/caf\xe9")
    with open(root + b"/caf\xe9/0.png", "wb") as file:
        file.write(pq.read_table(table)["image"][0].as_py())
    code, _, stderr = convert(tmp_path / "pictures", "--out", tmp_path / "out", "--log", tmp_path / "log")
    assert code == 0, stderr
    assert read(tmp_path / "out")[0].classes == ["caf\udce9"]


def test_a_log_that_cannot_be_written_is_a_mistake(tmp_path, table, convert):
    code, _, stderr = convert(table, "--out", tmp_path / "out", "--log", tmp_path / "nowhere" / "log")
    assert code == 2
    assert stderr.startswith("error: --log: cannot write to")
    assert os.listdir(tmp_path) == []
