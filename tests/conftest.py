"""Fixtures that several tests share. Helpers that are no fixtures are in tests/helpers."""

import functools
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads per process, in several processes, stall each other

import hypothesis
import pytest
import torch
from safetensors.torch import load_file

from sit_composer.sit import SiT
from tests.helpers.disk import Disk
from tests.helpers.paths import REFERENCE
from tests.helpers.s3 import SeaweedFS

torch.set_num_threads(1)
hypothesis.settings.register_profile("house", deadline=None)  # a busy machine is no fault
hypothesis.settings.load_profile("house")
# Tests of data fork, which a process that has trained can't: it holds Composer's threads and a process group.
FIRST = (
    *("tests/data", "test_faults", "test_resume", "test_torture", "test_docs", "test_ray", "test_tour"),
    *("tests/training", "tests/convert", "tests/evaluation", "test_benchmarks"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, as `make test` hands out files in this order."""
    items.sort(key=lambda item: next((i for i, part in enumerate(FIRST) if part in item.nodeid), len(FIRST)))


@pytest.fixture(scope="session")
def reference():
    """Loads the reference vectors of a name."""
    return lambda name: load_file(REFERENCE / f"{name}.safetensors")


@pytest.fixture(scope="session")
def meta() -> dict:
    return json.loads((REFERENCE / "meta.json").read_text())


@pytest.fixture
def tiny(reference, meta) -> SiT:
    """The reference's small network, in evaluation mode."""
    network = SiT(**meta["tiny_a"]["config"])
    network.load_state_dict(reference("tiny_a.weights"), strict=True)
    return network.eval()


@pytest.fixture(scope="session")
def digits_shards(tmp_path_factory) -> Path:
    """A folder of MDS shards of scikit-learn's digits, made by the converter."""
    from convert import to_mds

    out = tmp_path_factory.mktemp("digits") / "shards"
    assert to_mds.main(["digits", "--out", str(out), "--workers", "0"]) == 0
    return out


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory) -> Path:
    """A folder of about eight shards of 200 digits."""
    from tests.helpers.digits import write_digits

    return write_digits(tmp_path_factory.mktemp("few") / "shards")


@pytest.fixture
def run(digits_shards, tmp_path) -> Callable[..., int]:
    """Trains a tiny network on the digits in this process, so that Composer is imported once: the exit code."""
    from tests.helpers.runs import runner

    return runner(digits_shards, tmp_path)


@pytest.fixture
def convert(capsys):
    """Runs to_mds.py's command in this process, as streaming loads slowly: (exit code, stdout, stderr)."""
    from convert import to_mds

    def convert(*arguments):
        capsys.readouterr()
        code = to_mds.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return convert


@pytest.fixture(scope="session")
def table(tmp_path_factory) -> Path:
    """A Parquet file of 600 digits, in row groups of 25."""
    from tests.helpers.tables import write_table

    return write_table(tmp_path_factory.mktemp("table") / "digits.parquet")


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory) -> str:
    """A small AutoencoderKL."""
    from tests.helpers.autoencoders import write_autoencoder

    return write_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="session")
def vae_of_kind(tmp_path_factory) -> Callable[[str], str]:
    """Gives the folder of a small autoencoder of one of `autoencoders.KINDS`."""
    from tests.helpers.autoencoders import write_kind

    return functools.cache(lambda kind: write_kind(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory) -> Iterator[SeaweedFS]:
    server = SeaweedFS(tmp_path_factory.mktemp("s3"))
    yield server
    server.stop()


@pytest.fixture
def s3(seaweed, monkeypatch) -> SeaweedFS:
    """An S3 on loopback with the empty bucket sit, as S3_ENDPOINT_URL and the credentials of the environment say."""
    for name, value in (("AWS_ACCESS_KEY_ID", "testkey"), ("AWS_SECRET_ACCESS_KEY", "testsecret")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    seaweed.start_empty()
    monkeypatch.setenv("S3_ENDPOINT_URL", seaweed.url)
    return seaweed


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)], capture_output=True).returncode:
        pytest.skip("a small file system can't be mounted here: that takes root")
    yield Disk(path)
    subprocess.run(["umount", "--lazy", str(path)], check=True)
