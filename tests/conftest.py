"""Fixtures that several tests share."""

import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads a process, in several processes, stall each other

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sit_composer.sit import SiT

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
ROWS = 600  # of the fixture `table`
REFERENCE = Path(__file__).parent / "reference"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that fork come first: a process that has trained holds Composer's threads and a process group."""
    items.sort(key=lambda item: item.path.name != "test_data.py")


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
    """A folder of MDS shards of scikit-learn's digits, made by the converter as a user would."""
    out = tmp_path_factory.mktemp("digits") / "shards"
    command = [sys.executable, "convert/to_mds.py", "digits", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return out


@pytest.fixture
def convert(capsys):
    """Runs to_mds.py's command in this process, as streaming loads slowly: (exit code, stdout, stderr)."""
    from convert import to_mds

    def convert(*arguments):
        capsys.readouterr()
        code = to_mds.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return convert


def png(picture) -> bytes:
    """The file of a picture, given as an array."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def table(tmp_path_factory) -> Path:
    """A Parquet file of 600 digits, in row groups of 25."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [png((picture * 15).astype("uint8")) for picture in digits.images[:ROWS]]
    path = tmp_path_factory.mktemp("table") / "digits.parquet"
    pq.write_table(pa.table({"image": images, "label": digits.target[:ROWS]}), path, row_group_size=25)
    return path


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory) -> str:
    """A small AutoencoderKL, made and saved as the real ones are."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, scaling_factor=0.3, shift_factor=0.05,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return str(folder)


class SeaweedFS:
    """SeaweedFS on loopback, with one bucket. Its data outlive `stop`."""

    def __init__(self, folder):
        self.folder = folder
        self.process = None
        self.ready = False
        self._choose_ports()

    def _choose_ports(self):
        self.ports = free_ports(5)
        self.url = f"http://127.0.0.1:{self.ports[0]}"

    def start(self, attempts=5):
        import boto3
        from botocore.config import Config

        names = ("s3", "master", "volume", "filer", "admin")
        ports = [f"-{name}.port={port}" for name, port in zip(names, self.ports, strict=True)]
        weed = [Path(sys.executable).parent / "weed", "-logtostderr=true", "mini", f"-dir={self.folder}"]
        rest = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-webdav=false", "-admin.ui=false", "-bucket=sit"]
        rest += ["-s3.port.iceberg=0", "-s3.port.lance=0", *ports]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen([*weed, *rest], stdout=log, stderr=log, start_new_session=True)
        once = boto3.client("s3", endpoint_url=self.url, config=Config(retries={"total_max_attempts": 1}))
        # Just after a start, SeaweedFS at times answers "InternalError, please try again".
        self.client = boto3.client("s3", endpoint_url=self.url, config=Config(retries={"total_max_attempts": 9}))
        deadline = time.monotonic() + 30
        while True:
            try:
                once.put_object(Bucket="sit", Key="ready", Body=b"")
                self.ready = True
                return
            except Exception as error:
                # A test beside this one may have taken a port.
                if self.process.poll() is not None and not self.ready and attempts > 1:
                    self._choose_ports()
                    return self.start(attempts - 1)
                if time.monotonic() > deadline:
                    raise RuntimeError(f"SeaweedFS did not start: {(self.folder / 'log').read_text()}") from error
                time.sleep(0.1)

    def stop(self):
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def keys(self, prefix):
        found = self.client.list_objects_v2(Bucket="sit", Prefix=f"{prefix}/").get("Contents", [])
        return [entry["Key"] for entry in found]

    def contents(self, prefix):
        read = {key: self.client.get_object(Bucket="sit", Key=key)["Body"].read() for key in self.keys(prefix)}
        return {key.rpartition("/")[2]: data for key, data in read.items()}


def free_ports(count):
    """Ports that are free, as is each plus 10,000, where SeaweedFS listens for gRPC."""
    found = []
    while len(found) < count:
        port = random.randint(15_000, 22_000)
        try:
            for number in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", number))
            found.append(port)
        except OSError:
            continue
    return found


@pytest.fixture
def s3(tmp_path_factory, monkeypatch) -> Iterator[SeaweedFS]:
    """An S3 on loopback with the bucket sit, as S3_ENDPOINT_URL and the credentials of the environment say."""
    for name, value in (("AWS_ACCESS_KEY_ID", "testkey"), ("AWS_SECRET_ACCESS_KEY", "testsecret")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = SeaweedFS(tmp_path_factory.mktemp("s3"))
    try:
        server.start()
        monkeypatch.setenv("S3_ENDPOINT_URL", server.url)
        yield server
    finally:
        server.stop()


class Disk:
    """A file system of its own, of four megabytes."""

    def __init__(self, path: Path):
        self.path = path

    def fill(self, free: int) -> None:
        """Leaves that many bytes."""
        with open(self.path / "filler", "wb") as filler:
            filler.write(bytes(shutil.disk_usage(self.path).free - free))

    def clear(self) -> None:
        (self.path / "filler").unlink()


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)], capture_output=True).returncode:
        pytest.skip("a small file system can't be mounted here: that takes root")
    yield Disk(path)
    subprocess.run(["umount", "--lazy", str(path)], check=True)
