"""Kills a run at random moments and restarts it, with data and checkpoints in a real S3; then compares the result:

    python -m tests.helpers.torture --kills 50 --ranks 2 --fsdp

Every process of the run is killed with kill -9: in turn while it starts, in a step, in a save, in an upload. In the end
its last checkpoint must equal, bit for bit, that of a run without kills; and each start must have resumed from the
newest checkpoint that was complete when the start before was killed. Exit code 1 if not.
"""

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from sit_composer.checkpoint.folder import fetch_checkpoint, newest
from sit_composer.checkpoint.safe_load import METADATA
from sit_composer.storage import LocalFolder, S3Folder
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.paths import ROOT
from tests.helpers.s3 import SeaweedFS

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "testkey", "AWS_SECRET_ACCESS_KEY": "testsecret", "AWS_DEFAULT_REGION": "us-east-1"}
COMPOSER = str(Path(sys.executable).parent / "composer")
BATCHES, INTERVAL = 80, 4
MOMENTS = ("save", "start", "upload", "step")
UPLOAD = re.compile(r"(PUT|POST) /sit/runs/\w+/ep")


class Torture:
    def __init__(self, top: Path, ranks: int, fsdp: bool, proxy: FaultProxy):
        self.top, self.ranks, self.fsdp, self.proxy = top, ranks, fsdp, proxy
        self.startup = 15.0  # seconds to the first batch

    def start(self, name: str, attempt: int) -> subprocess.Popen:
        overrides = [
            f"run_name={name}", "data.remote=s3://sit/shards", f"data.local={self.top}/cache-{name}", "data.flip=true",
            # A checkpoint of 9 MB, which one process uploads in two parts.
            "model.hidden_size=128", "model.depth=2", "model.num_heads=2",
            f"trainer.max_duration={BATCHES}ba", f"trainer.save_interval={INTERVAL}ba",
            "trainer.progress_bar=false",
            "trainer.save_folder=s3://sit/runs/{run_name}", "callbacks={}",
            "trainer.save_num_checkpoints_to_keep=3",
            f"loggers={{file: {{filename: '{self.log(name, attempt)}', flush_interval: 1}}}}",
            "supervision.heartbeat=2",
        ]  # fmt: skip
        command = [COMPOSER, "-n", str(self.ranks), "-m", "tests.helpers.ranks", "yamls/quickstart.yaml", *overrides]
        self.temporary(name).mkdir(exist_ok=True)
        with open(self.top / f"{name}-{attempt}.out", "wb") as out:
            return subprocess.Popen(
                [*command, *(["fsdp={}"] if self.fsdp else [])],
                cwd=ROOT,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env={**os.environ, "TMPDIR": str(self.temporary(name))},
            )

    def temporary(self, name: str) -> Path:
        """Where a run's checkpoints are until they are uploaded."""
        return self.top / f"temporary-{name}"

    def unsent(self, name: str) -> list[Path]:
        """Rank 0's files of checkpoints there, complete or not."""
        place = self.temporary(name)
        return [*place.glob("sit_composer-*/rank0/ep*.pt"), *place.glob("sit_composer-*/rank0/ep*/*")]

    def log(self, name: str, attempt: int) -> Path:
        return self.top / f"{name}-{attempt}.log"

    def batches(self, name: str, attempt: int) -> list[int]:
        """The batches that an attempt logged at their start."""
        log = self.log(name, attempt)
        return [int(n) for n in re.findall(r": time/batch: (\d+)", log.read_text())] if log.exists() else []

    def await_moment(self, process: subprocess.Popen, name: str, attempt: int, moment: str, rng: random.Random) -> None:
        """Waits until the run comes to a moment of this kind, and for a random time within it."""
        if moment == "start":
            self.wait(process, lambda: False, rng.uniform(0, self.startup))
            return
        start = batch_of(newest(S3Folder(f"s3://sit/runs/{name}")))
        target = start + rng.randint(1, 10)
        self.wait(process, lambda: max(self.batches(name, attempt), default=0) >= target)
        if moment == "step":
            time.sleep(rng.uniform(0, 0.5))
            return
        before, asked = self.unsent(name), len(self.proxy.requests)
        if moment == "save":
            self.wait(process, lambda: set(self.unsent(name)) - set(before), pause=0.001)
            time.sleep(rng.uniform(0, 0.02))
        else:
            self.wait(process, lambda: any(UPLOAD.match(r) for r in self.proxy.requests[asked:]), pause=0.001)
            time.sleep(rng.uniform(0, 0.1))

    def wait(self, process: subprocess.Popen, until, seconds: float = 300, pause: float = 0.05) -> None:
        """Waits until a condition holds, the run has ended, or time is up."""
        deadline = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < deadline and not until():
            time.sleep(pause)

    def moment(self, name: str, attempt: int) -> str:
        """The moment in which the run was killed, judged by the files that it left."""
        if not self.batches(name, attempt):
            return "start"
        for left in self.unsent(name):
            whole = (
                left.with_name(METADATA).exists() if self.fsdp else LocalFolder(str(left.parent)).is_whole(left.name)
            )
            return "upload" if whole else "save"
        return "step"

    def run_to_its_end(self, name: str, attempt: int) -> None:
        process, before = self.start(name, attempt), time.monotonic()
        try:
            self.wait(process, lambda: self.batches(name, attempt))
            self.startup = time.monotonic() - before
            code = process.wait(timeout=600)
        finally:
            kill(process)
        if code != 0:
            raise SystemExit(
                f"attempt {attempt} ended with {code}:\n{(self.top / f'{name}-{attempt}.out').read_text()}"
            )

    def content(self, name: str) -> dict:
        from sit_composer.checkpoint.safe_load import load_file
        from sit_composer.checkpoint.sharded import load_sharded

        folder = S3Folder(f"s3://sit/runs/{name}")
        last = newest(folder)
        assert re.fullmatch(rf"ep\d+-ba{BATCHES}(-rank0\.pt)?", last), last
        fetch_checkpoint(folder, last, self.top / name)
        place = self.top / name / last
        # The S3 client draws its waits from Python's own generator, which training doesn't use.
        if self.fsdp:
            kept = re.compile(r"(?!.*CheckpointSaver|.*run_name|rng\.\d+\.python).*")
            return load_sharded(place, lambda entry: kept.fullmatch(entry) is not None)
        found = load_file(place)
        found["state"]["callbacks"].pop("CheckpointSaver")
        found["state"].pop("run_name")
        for rng in found["rng"]:
            rng.pop("python")
        return found


def kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def batch_of(name: str | None) -> int:
    return int(re.search(r"-ba(\d+)", name)[1]) if name else 0


def torture(kills: int, ranks: int, fsdp: bool, seed: int, top: Path) -> list[str]:
    """Returns what went wrong."""
    from tests.helpers.runs import differences

    rng, faults, hit = random.Random(seed), [], Counter()
    (top / "s3").mkdir()
    server = SeaweedFS(top / "s3")
    try:
        server.start()
        with FaultProxy(server.url) as proxy:  # it only shows when an upload begins
            os.environ["S3_ENDPOINT_URL"] = proxy.url
            run = Torture(top, ranks, fsdp, proxy)
            command = [sys.executable, "convert/to_mds.py", "digits", "--out", "s3://sit/shards"]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
            run.run_to_its_end("whole", 0)
            whole, rounds = run.content("whole"), 0
            while hit.total() < kills:  # a run that ends between two kills is followed by another
                name, expected, attempt = f"killed{rounds}", 0, 0
                while hit.total() < kills and expected < BATCHES:
                    process = run.start(name, attempt)
                    try:
                        run.await_moment(process, name, attempt, MOMENTS[hit.total() % len(MOMENTS)], rng)
                        alive = process.poll() is None
                    finally:
                        kill(process)
                    hit.update([run.moment(name, attempt)] if alive else [])
                    seen = run.batches(name, attempt)
                    if seen and seen[0] != expected:
                        faults.append(f"{name}: start {attempt} went on from batch {seen[0]}, not from {expected}")
                    if seen and seen != list(range(seen[0], seen[0] + len(seen))):
                        faults.append(f"{name}: start {attempt} skipped or repeated batches: {seen}")
                    expected, attempt = batch_of(newest(S3Folder(f"s3://sit/runs/{name}"))), attempt + 1
                    print(f"{name}: batches {seen[:1]} to {seen[-1:]}, checkpoint {expected}; {dict(hit)}", flush=True)
                run.run_to_its_end(name, attempt)
                faults += [f"{name}: {entry} differs" for entry in differences(whole, run.content(name))]
                rounds += 1
    finally:
        server.stop()
    if kills >= 5 * len(MOMENTS):
        faults += [f"no kill came in the moment {moment!r}" for moment in MOMENTS if not hit[moment]]
    return faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT, OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as folder:
        found = torture(args.kills, args.ranks, args.fsdp, args.seed, Path(folder))
    print("\n".join(found) or f"{args.kills} kills left no trace")
    sys.exit(1 if found else 0)
