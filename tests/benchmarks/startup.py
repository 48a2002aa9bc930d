"""Measures what a command takes before its work, against an earlier checkout:   python tests/benchmarks/startup.py PATH

Each command runs in both checkouts in turn, each with its own .venv, on the digits: training's first batch by
one process, and by the launcher with two ranks; conversion; its check; and four samples. Prints a Markdown table of the
medians of CPU seconds, of all processes together, and this checkout's over the earlier one's.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ["sit_composer/train.py", "yamls/quickstart.yaml", "data.local={0}/shards", "trainer.max_duration=1ba"]
COMMANDS = {  # {0} is a scratch folder, {1} a new name
    "train, 1 batch": [*TRAIN, "run_name={1}", "trainer.save_folder={0}/{1}"],
    "`composer -n 2`, 1 batch": ["-c", "LAUNCH", "-n", "2", *TRAIN, "run_name={1}", "trainer.save_folder={0}/{1}"],
    "to_mds.py digits": ["convert/to_mds.py", "digits", "--out", "{0}/{1}"],
    "verify_mds.py": ["convert/verify_mds.py", "{0}/shards"],
    "sample, 4 images": ["-m", "sit_composer.sample", "{0}/run", "--out", "{0}/{1}", "--num-images", "4"],
}
OLD, NEW = "composer.cli.launcher", "sit_composer.launch"  # what `composer` runs


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH", type=Path, help="the earlier checkout, after make install")
    parser.add_argument("--rounds", type=int, default=3, help="the median of them is printed (%(default)s)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        run(ROOT, COMMANDS["to_mds.py digits"], scratch, "shards")
        run(args.path, COMMANDS["train, 1 batch"], scratch, "run")  # whose checkpoint both read
        print("| command | before, CPU seconds | now | ratio |")
        print("| --- | ---: | ---: | ---: |")
        for name, command in COMMANDS.items():
            new = [f"{name.split()[0].strip('`')}-{i}" for i in range(2 * args.rounds)]
            times = [run((args.path, ROOT)[i % 2], command, scratch, folder) for i, folder in enumerate(new)]
            before, now = statistics.median(times[::2]), statistics.median(times[1::2])
            print(f"| {name} | {before:.1f} | {now:.1f} | {now / before:.2f} |", flush=True)
    return 0


def run(checkout: Path, command: list[str], scratch: str, name: str) -> float:
    """The CPU seconds of a command, its child processes included."""
    launcher = NEW if (checkout / "sit_composer" / "lean.py").exists() else OLD
    launch = f"import sys; from {launcher} import main; sys.exit(main())"
    words = [launch if word == "LAUNCH" else word.format(scratch, name) for word in command]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # with it, each process compiles the libraries again
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    python = checkout / ".venv" / "bin" / "python"
    done = subprocess.run([python, *words], cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: {' '.join(words)}\n{done.stdout}{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main())
