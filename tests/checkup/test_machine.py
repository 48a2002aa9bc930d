"""Checks of this machine, each on a fault that the test makes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sit_composer.checkup import machine
from sit_composer.config.load import load_config
from sit_composer.data.spec import DataSpec
from tests.helpers.paths import ROOT


def install(folder: Path, name: str, version: str) -> None:
    """What pip leaves of a package."""
    (folder / f"{name}-{version}.dist-info").mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(metadata)


def test_packages_are_compared_with_what_the_project_requires(tmp_path):
    install(tmp_path, "mosaicml", "0.32.1")
    install(tmp_path, "torch", "2.7.0")
    path = [str(tmp_path)]
    assert machine.packages(["mosaicml==0.32.1", "torch==2.7.0", "gradio; extra == 'demo'"], path).status == "ok"
    missing = machine.packages(["mosaicml==0.32.1", "omegaconf>=2.3"], path)
    assert str(missing) == f"failed: not installed: omegaconf; {machine.INSTALL}"
    other = machine.packages(["mosaicml==0.33", "torch==2.9.1"], path)
    assert other.status == "failed"
    assert "mosaicml: got 0.32.1, expected ==0.33; torch: got 2.7.0, expected ==2.9.1" in other.text
    newer = machine.packages(["mosaicml==0.32.1", "torch==2.9.1"], path)
    assert (newer.status, newer.text) == ("warning", "torch: got 2.7.0, expected ==2.9.1")


def test_this_environment_has_the_packages_that_are_required():
    assert machine.packages(machine.distribution(machine.OWN).requires).status == "ok"
    assert machine.python().status == "ok"


def test_mosaicmls_own_launcher_is_told_from_this_one(tmp_path):
    assert machine.launcher(Path(sys.executable).with_name("composer")).status == "ok"
    script = tmp_path / "composer"
    assert "no command" in machine.launcher(script).text
    script.write_text("from composer.cli import launcher")
    found = machine.launcher(script)
    assert found.status == "warning"
    assert "--force-reinstall" in found.advice


def test_a_low_limit_of_open_files_fails_and_says_which_one_is_needed():
    code = "from resource import *; from sit_composer.checkup.machine import files; print(files(8)); "
    code += "setrlimit(RLIMIT_NOFILE, (200, 200)); print(files(8))"
    limited = ["bash", "-c", f'ulimit -Sn 200; exec "{sys.executable}" -c "{code}"']
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, timeout=100)
    low, hard = done.stdout.splitlines()
    assert re.fullmatch(r"failed: a process may open 200, expected at least 576; raise the limit: ulimit -n \d+", low)
    assert "have the hard limit raised" in hard


def test_shared_memory_is_compared_with_what_loaders_need(disk):
    assert machine.shared(str(disk.path), 2**20).status == "ok"
    assert machine.shared(str(disk.path), 3 * 2**20).status == "warning"
    found = machine.shared(str(disk.path), 2**30)
    assert found.status == "failed"
    assert "the loader needs 1" in found.text
    assert "--shm-size" in found.advice
    assert machine.shared("/nowhere/shm", None).status == "not checked"


def test_the_need_of_shared_memory_is_that_of_the_workers_batches(monkeypatch):
    yaml, run = str(ROOT / "yamls/sit_xl_2.yaml"), ["trainer.save_folder=x", "data.local=x", "data.num_workers=2"]
    config = load_config(yaml, [*run, "data.global_batch_size=16"])
    elsewhere = 2 * 4 * 16 * 3 * 256**2  # workers, places, samples, and an image
    assert machine.shared_need(config, {}) == elsewhere
    shards = {"kind": "latents", "channels": 4, "image_size": 256, "num_classes": 1, "classes": ["a"], "samples": 9}
    spec = DataSpec(**shards, class_counts=[9])
    assert machine.shared_need(config, {"data": spec}) == 2 * 4 * 16 * 2 * 8 * 32**2  # float16 means and deviations
    for name, value in (("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert machine.shared_need(config, {}) == elsewhere / 2


def test_a_disk_is_written_to_and_left_as_it_was(tmp_path):
    found = machine.disk(str(tmp_path / "runs" / "first"))
    assert found.status == "ok"
    assert re.search(rf"GiB free in {tmp_path}, \S+ MB/s written and synced", found.text)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_space_for_two_checkpoints_warns_and_for_none_fails(disk):
    assert machine.disk(str(disk.path), 2**20, 1000).status == "ok"
    assert machine.disk(str(disk.path), 3 * 2**20, 1000).status == "warning"
    assert machine.disk(str(disk.path), 5 * 2**20, 1000).status == "failed"
    slow = machine.disk(str(disk.path), 2**20, 1e-9)
    assert slow.status == "warning"
    assert "supervision.grace" in slow.advice


def test_a_full_disk_and_a_file_in_the_way_fail(disk, tmp_path):
    disk.fill(0)
    assert str(machine.disk(str(disk.path))).startswith(f"failed: {disk.path}: No space left on device; free some")
    (tmp_path / "runs").write_text("")
    found = machine.disk(str(tmp_path / "runs" / "first"))
    assert (found.status, found.text) == ("failed", f"{tmp_path}/runs is a file, expected a folder")


def test_a_disk_that_is_mounted_read_only_fails(disk):
    if subprocess.run(["mount", "-o", "remount,ro", str(disk.path)], capture_output=True).returncode:
        pytest.skip("it can't be mounted read-only here")
    assert "Read-only file system" in machine.disk(str(disk.path)).text
