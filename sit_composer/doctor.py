"""Checks a machine, and what a run needs of it:   python -m sit_composer.doctor [YAML] [key=value ...]

A line per check: ok, warning, failed (and what to do), or not checked (and why). Without a YAML, only the machine.
Between ranks, with what each one has: composer -n N -m sit_composer.doctor [YAML], on every node as for a training.
Nothing is left behind, and no credential is printed. The exit code is 1 if a check has failed. Whether a run itself
could start, with its data and its earlier checkpoints, says sit_composer/train.py --dry-run.
"""

import os
import platform
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import import_module

from sit_composer.checkup import machine
from sit_composer.checkup.finding import Finding, bounded, ok
from sit_composer.cli import hide, is_remote, load, make_parser, run_command
from sit_composer.config.checks import check
from sit_composer.config.data_fits import local_spec
from sit_composer.config.load import load_config
from sit_composer.config.ranks import save_folder
from sit_composer.config.schema import Config
from sit_composer.data.spec import DataSpec
from sit_composer.errors import UserError

DISK = "free some space or make it writable, or choose another folder"
TORCH = "reinstall torch: pip install --force-reinstall torch==2.7.0"


class Report:
    """Makes checks, and prints each one's line when it is known: the first rank of each node prints, and all make."""

    def __init__(self) -> None:
        self.findings: list[tuple[str, Finding]] = []
        self.shown = os.environ.get("LOCAL_RANK", "0") == "0"

    def make(self, name: str, seconds: float, check: Callable[[], Finding], advice: str) -> Finding:
        finding = bounded(check, seconds, advice)
        self.add(name, finding)
        return finding

    def add(self, name: str, finding: Finding) -> None:
        self.findings.append((name, finding))
        self.say(f"  {name:<24} {finding}")

    def say(self, text: str) -> None:
        if self.shown:
            print(hide(text), flush=True)

    def failures(self) -> list[str]:
        return [hide(f"{name}: {finding.text}") for name, finding in self.findings if finding.status == "failed"]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a check failed, or 2 for a mistake in the command or the YAML."""
    parser = make_parser("python -m sit_composer.doctor", __doc__)
    parser.add_argument("yaml", nargs="?", help="a run's config")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="override the YAML's keys")
    args = parser.parse_intermixed_args(argv)

    def work() -> int:
        config = load_config(args.yaml, args.overrides) if args.yaml is not None else None
        if config is not None:
            check(config)
        return examine(config)

    return run_command(work)


def examine(config: Config | None) -> int:
    """Makes all checks. Returns the exit code."""
    report = Report()
    report.say(f"{socket.gethostname()}, {platform.platform()}, {len(os.sched_getaffinity(0))} processors")
    specs = find_specs(config)
    if report.shown:
        machine.check_machine(report.make, config, specs)
    if report.make("torch", 120, load_torch, TORCH).status == "ok":
        devices = import_module("sit_composer.checkup.devices")
        devices.check_devices(report.make, config, specs)
        if report.shown:
            check_disks(report, config)
        others: list[tuple[str, Finding]] = []
        between = import_module("sit_composer.checkup.between")
        work = partial(between.check_ranks, report.failures(), others)
        report.make("ranks", between.SECONDS + 30, work, between.CONNECT)
        for name, finding in others if os.environ.get("RANK", "0") == "0" else ():
            report.add(name, finding)
    if config is not None and report.shown:
        import_module("sit_composer.checkup.stores").check_stores(report.make, config)
    counts = Counter(finding.status for _, finding in report.findings)
    report.say(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if counts["failed"] else 0


def find_specs(config: Config | None) -> dict[str, DataSpec]:
    """The specs of shards that are on this machine; those that can't be read are left to --dry-run."""
    found = {}
    for section in ("data", "eval_data"):
        data = getattr(config, section, None)
        try:
            spec = local_spec(data, section) if data is not None else None
        except UserError:
            continue
        if spec is not None:
            found[section] = spec
    return found


def load_torch() -> Finding:
    load("torch")
    import_module("sit_composer.checkup.devices")
    return ok(import_module("torch").__version__)


def check_disks(report: Report, config: Config | None) -> None:
    """Checks the folders that a run writes to. Checkpoints for a store are made in the temporary folder."""
    folders: dict[str, tuple[str, int, float]] = {"TMPDIR": (tempfile.gettempdir(), 0, 0)}
    if config is not None:
        size, grace = import_module("sit_composer.costs.estimate").checkpoint_bytes(config), config.supervision.grace
        folder = save_folder(config) if config.trainer.get("save_folder") else ""
        if is_remote(folder):
            folders["TMPDIR"] = (tempfile.gettempdir(), size, grace)
        elif folder:
            folders["trainer.save_folder"] = (folder, size, grace)
        for section in ("data", "eval_data"):
            data = getattr(config, section)
            if data is not None and data.remote is not None:
                folders[f"{section}.local"] = (data.local, 0, 0)
    for name, arguments in folders.items():
        report.make(f"disk {name}", 30, lambda arguments=arguments: machine.disk(*arguments), DISK)  # type: ignore[misc]


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # at once: a check that gave no answer may still wait in its thread
