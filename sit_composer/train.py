"""Trains a SiT:   composer [-n RANKS] sit_composer/train.py YAML [key=value ...]

Run the same command again to resume, or to be told that the run is finished.
"""

import argparse
import os
import sys
import time
from pathlib import Path

# A script run by its path finds its own folder first, where config, data and others would shadow other packages.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]
from sit_composer import launch
from sit_composer.choices import COUNT
from sit_composer.cli import hand_over, leave, make_parser, number, run_command
from sit_composer.config.checks import check
from sit_composer.config.data_fits import check_data, local_spec
from sit_composer.config.load import load_config
from sit_composer.config.same_run import check_same_run, check_start
from sit_composer.config.schema import Config, documentation
from sit_composer.errors import UserError

EXAMPLES = ("yamls/quickstart.yaml", "yamls/sit_b_2.yaml", "yamls/sit_xl_2.yaml")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 when trained, 143 or 130 when saved after a SIGTERM or Ctrl-C, 2 for a mistake."""
    launch.follow_launcher()
    keys = "keys of the YAML, with defaults (???: must be given):\n" + documentation()
    usage = "%(prog)s [-h] [--dry-run] [--replay BATCH] yaml [key=value ...]"
    parser = make_parser("composer sit_composer/train.py", __doc__, epilog=keys, usage=usage)
    parser.add_argument("yaml", nargs="?", help="the run's config, such as yamls/quickstart.yaml")
    overrides = "override the YAML's keys, such as data.local=/data"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=overrides)
    dry_run = "print the run, its memory and its cost, check what it needs, and start nothing"
    parser.add_argument("--dry-run", action="store_true", help=dry_run)
    replay = "train up to this batch again, show what is not finite in it, and save nothing"
    parser.add_argument("--replay", type=number(COUNT), metavar="BATCH", help=replay)
    args = parser.parse_intermixed_args(argv)
    if args.yaml is None or ("=" in args.yaml and not Path(args.yaml).exists()):
        parser.error(f"argument yaml: no value, expected a run's config, such as {', '.join(EXAMPLES)}")
    stopped = "stopped; rerun the same command to resume from the last checkpoint"
    return run_command(lambda: run(args), stopped, errors=(UserError,))


def run(args: argparse.Namespace) -> int:
    """Checks without torch, then trains."""
    try:
        config = load_config(args.yaml, args.overrides)
        check(config)
        if not args.dry_run:
            check_local(config)
    except UserError:
        if os.environ.get("RANK", "0") != "0":
            # Rank 0 prints the same error. If another rank exited first, the launcher would end rank 0 and return its
            # "terminated" as exit code. Another node may have an error of its own.
            time.sleep(60)
        raise
    if args.dry_run:
        return hand_over("sit_composer.training.dry_run", config, "torch", "composer", "streaming") or 0
    if args.replay is not None:
        return hand_over("sit_composer.training.replay", (config, args.replay), "torch", "composer", "streaming") or 0
    return hand_over("sit_composer.training.fit", config, "torch", "composer", "streaming") or 0


def check_local(config: Config) -> None:
    """Checks the config against an earlier run and shards, if these are on this machine."""
    check_same_run(config)
    if os.environ.get("RANK", "0") == "0":  # which reads the weights to start from
        check_start(config)
    for section in ("data", "eval_data"):
        data = getattr(config, section)
        if data is not None and (spec := local_spec(data, section)) is not None:
            check_data(config, spec, section)


if __name__ == "__main__":
    leave(main)
