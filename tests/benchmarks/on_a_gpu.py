"""Measures everything on one GPU, offline, in under ten minutes:   python tests/benchmarks/on_a_gpu.py --out gpu.json

Prints the tables of docs/performance.md, and writes all numbers with machine, versions and commit as JSON. It runs from
a checkout with nothing installed but Python 3.11 or 3.12, torch, numpy, torchdiffeq and what `--wheels` lists; whatever
is missing of these costs only the rows that need it, which say so. Without Composer, the step's own functions run in a
plain loop. `--tables FILE` prints the tables of an earlier run; `--tiny` runs everything in small, on a CPU too.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # in place of this file's folder

from tests.benchmarks.gpu.harness import number, run_groups, told  # noqa: E402
from tests.benchmarks.gpu.names import TABLES  # noqa: E402

# Which rows need what beside torch, numpy and torchdiffeq: names for `pip download --no-deps`. Found with torch 2.11.0
# on Python 3.12; of what transformers, torchvision and Hugging Face's packages bring, all was there.
LEAN = ("importlib_metadata==8.7.0", "zipp")
OMEGACONF = ("omegaconf", "antlr4-python3-runtime==4.9.3", "PyYAML")
CODECS = ("Brotli", "python-snappy", "cramjam", "zstd", "xxhash")
WHEELS = {
    "steps": OMEGACONF,
    "encoding": (*OMEGACONF, "diffusers", *LEAN),
    "latents": (*OMEGACONF, *LEAN, "mosaicml-streaming==0.13.0", "catalogue", *CODECS,
                "boto3", "botocore", "s3transfer", "jmespath"),
    "Composer's Trainer": ("mosaicml==0.32.1", "and all that it requires"),
}  # fmt: skip
VERSIONS = ("torch", "triton", "numpy", "torchdiffeq", "mosaicml", "mosaicml-streaming", "diffusers")
BUDGET = 570.0  # seconds


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 if every row has numbers, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here")
    parser.add_argument("--groups", nargs="+", choices=TABLES, default=list(TABLES), help="only these (all)")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="for all rows together (%(default)g)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a test")
    parser.add_argument("--tables", type=Path, metavar="FILE", help="only print the tables of this JSON")
    parser.add_argument("--wheels", action="store_true", help="only print which packages are needed for what")
    args = parser.parse_args(argv)
    if args.wheels:
        print("\n".join(f"{what}: {' '.join(names)}" for what, names in WHEELS.items()))
        return 0
    if args.tables:
        print(tables(json.loads(args.tables.read_text())))
        return 0
    start = time.monotonic()
    with get_context("forkserver").Pool(1) as pool:  # so that this process holds nothing of the GPU
        found = pool.apply(machine)
    report = {"machine": found, "versions": versions(), "commit": commit(), "tiny": args.tiny}
    rows = run_groups(args.groups, found["device"], args.tiny, args.seconds)
    report |= {"seconds": time.monotonic() - start, "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(tables(report))
    return int(any("error" in row for row in rows.values()))


def machine() -> dict[str, Any]:
    """What this machine is. Run in a process of its own: it starts CUDA."""
    import torch  # not at the head: --tables and --wheels need none

    cuda = torch.cuda.is_available()
    found = {
        "device": "cuda" if cuda else "cpu",
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "python": platform.python_version(),
        "kernel": platform.release(),
    }
    if cuda:
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": properties.total_memory / 2**30,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver, power limit, highest clock": output(query),
        }
    return found


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str | None]:
    """Of the packages that decide the numbers; None for those that aren't there."""
    found: dict[str, str | None] = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """This checkout's, and whether files were changed since; None without git."""
    found = output(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"])
    return found or None


def output(command: list[str]) -> str:
    """What a command prints; nothing if there is no such command, or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def tables(report: dict[str, Any]) -> str:
    """The report in Markdown, with the same rows and their errors."""
    found, packages = report["machine"], report["versions"]
    where = [found.get("gpu", "no GPU"), f"{found['cores']} cores of {found['processor']}", f"Python {found['python']}"]
    where += [f"{name} {version}" for name, version in packages.items() if version] + [f"commit {report['commit']}"]
    parts = [
        ("Tiny sizes, for a test: " if report["tiny"] else "On ") + ", ".join(where) + f"; {report['seconds']:.0f} s."
    ]
    for group, (title, columns) in TABLES.items():
        rows = {name: row for name, row in report["rows"].items() if row["group"] == group}
        if rows:
            parts += [f"### {title}", table(rows, columns)]
    return "\n\n".join(parts)


def table(rows: dict[str, dict[str, Any]], columns: dict[str, str]) -> str:
    """One table; numbers that have no column, and errors, follow it as a list."""
    lines = [["row", *columns.values()], ["---", *("---:" for _ in columns)]]
    notes = []
    for name, row in rows.items():
        cells = [number(row[key]) if key in row else "" for key in columns]
        rest = {key: value for key, value in row.items() if key not in columns and key != "group"}
        if any(cells):
            lines.append([name, *cells])
        if rest:
            notes.append(f"* {name}: {told(rest)}")
    made = ["| " + " | ".join(line) + " |" for line in lines] if len(lines) > 2 else []
    return "\n".join([*made, *([""] if made and notes else []), *notes])


if __name__ == "__main__":
    sys.exit(main())
