"""Kills a run at random moments and starts it again, with data and checkpoints in a real S3; then looks for a trace:

    python -m tests.torture --kills 50 --ranks 2 --fsdp

Every process of the run is killed with kill -9: while it starts, in a step, in a save, in an upload. In the end all
that its last checkpoint holds must equal, bit for bit, that of a run which nobody killed; and each start must have gone
on from the newest checkpoint that was whole when the one before was killed. Exit code 1 if not.
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
from pathlib import Path

from sit_composer.run_folder import S3Folder, fetch_checkpoint, newest
from tests.conftest import ROOT, SeaweedFS

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "testkey", "AWS_SECRET_ACCESS_KEY": "testsecret", "AWS_DEFAULT_REGION": "us-east-1"}
COMPOSER = str(Path(sys.executable).parent / "composer")
BATCHES, INTERVAL = 160, 8


class Torture:
    def __init__(self, top: Path, ranks: int, fsdp: bool):
        self.top, self.ranks, self.fsdp = top, ranks, fsdp

    def start(self, name: str, attempt: int) -> subprocess.Popen:
        overrides = [
            f"run_name={name}", "data.remote=s3://sit/shards", f"data.local={self.top}/cache-{name}", "data.flip=true",
            "data.global_batch_size=256", "model.hidden_size=32", "model.depth=2", "model.num_heads=2",
            f"trainer.max_duration={BATCHES}ba", f"trainer.save_interval={INTERVAL}ba",
            "trainer.progress_bar=false",
            "trainer.save_folder=s3://sit/runs/{run_name}", "callbacks={}",
            "trainer.save_num_checkpoints_to_keep=3",
            f"loggers={{file: {{filename: '{self.log(name, attempt)}', flush_interval: 1}}}}",
            "supervision.heartbeat=2",
        ]  # fmt: skip
        command = [COMPOSER, "-n", str(self.ranks), "-m", "tests.ranks", "yamls/quickstart.yaml", *overrides]
        with open(self.top / f"{name}-{attempt}.out", "wb") as out:
            return subprocess.Popen(
                [*command, *(["fsdp={}"] if self.fsdp else [])],
                cwd=ROOT,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def log(self, name: str, attempt: int) -> Path:
        return self.top / f"{name}-{attempt}.log"

    def batches(self, name: str, attempt: int) -> list[int]:
        """The batches that an attempt logged having begun."""
        log = self.log(name, attempt)
        return [int(n) for n in re.findall(r": time/batch: (\d+)", log.read_text())] if log.exists() else []

    def await_moment(self, process: subprocess.Popen, name: str, attempt: int, rng: random.Random, start: int) -> None:
        """Waits until some moment of the start, or until some batches after the first are done and a bit longer."""
        if rng.random() < 0.2:
            target, deadline = BATCHES + 1, time.monotonic() + rng.uniform(0, 15)
        else:
            target, deadline = start + rng.randint(1, 40), time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if max(self.batches(name, attempt), default=0) >= target:
                time.sleep(rng.uniform(0, 0.5))
                return
            time.sleep(0.05)

    def run_to_its_end(self, name: str, attempt: int) -> None:
        process = self.start(name, attempt)
        try:
            code = process.wait(timeout=600)
        finally:
            kill(process)
        if code != 0:
            raise SystemExit(
                f"attempt {attempt} ended with {code}:\n{(self.top / f'{name}-{attempt}.out').read_text()}"
            )

    def content(self, name: str) -> dict:
        from sit_composer.safe_load import load_file, load_sharded

        folder = S3Folder(f"s3://sit/runs/{name}")
        last = newest(folder)
        assert re.fullmatch(rf"ep\d+-ba{BATCHES}(-rank0\.pt)?", last), last
        fetch_checkpoint(folder, last, self.top / name)
        place = self.top / name / last
        # What S3's client waits between two attempts comes from Python's own generator, which training doesn't use.
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
    """What went wrong; nothing is what should."""
    from tests.test_train import differences

    rng, faults = random.Random(seed), []
    (top / "s3").mkdir()
    server = SeaweedFS(top / "s3")
    os.environ["S3_ENDPOINT_URL"] = server.url
    run = Torture(top, ranks, fsdp)
    try:
        server.start()
        command = [sys.executable, "convert/to_mds.py", "digits", "--out", "s3://sit/shards"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
        run.run_to_its_end("whole", 0)
        whole, done, rounds = run.content("whole"), 0, 0
        while done < kills:  # a run that comes to its end between two kills is followed by another
            name, expected, attempt = f"killed{rounds}", 0, 0
            while done < kills and expected < BATCHES:
                process = run.start(name, attempt)
                try:
                    run.await_moment(process, name, attempt, rng, expected)
                    done += process.poll() is None
                finally:
                    kill(process)
                seen = run.batches(name, attempt)
                if seen and seen[0] != expected:
                    faults.append(f"{name}: start {attempt} went on from batch {seen[0]}, not from {expected}")
                if seen and seen != list(range(seen[0], seen[0] + len(seen))):
                    faults.append(f"{name}: start {attempt} skipped or repeated batches: {seen}")
                expected, attempt = batch_of(newest(S3Folder(f"s3://sit/runs/{name}"))), attempt + 1
                print(f"{name}, kill {done}: batches {seen[:1]} to {seen[-1:]}, checkpoint {expected}", flush=True)
            run.run_to_its_end(name, attempt)
            faults += [f"{name}: {entry} differs" for entry in differences(whole, run.content(name))]
            rounds += 1
    finally:
        server.stop()
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
