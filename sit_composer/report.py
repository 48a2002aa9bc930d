"""Writes a page about a run:   python -m sit_composer.report RUN [RUN2] --out report.html

RUN is the folder of a run's checkpoints, on disk or in an object store. The page has what was trained and where, the
curves of all that was logged, images over time, checkpoints, evaluations, the config, and how to resume, sample and
export the run. It is one file that needs no other, also while the run is going. Two runs are compared.

A run writes the same page at each save if its config has report: true.
"""

import argparse
import os
import sys
from pathlib import Path

from sit_composer.cli import is_remote, load, make_parser, run_command
from sit_composer.errors import UserError
from sit_composer.outputs import check_output, write_bytes


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("python -m sit_composer.report", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's save_folder: a folder, or s3://BUCKET/PREFIX")
    parser.add_argument("--out", default="report.html", metavar="FILE.html", help="the page (report.html)")
    args = parser.parse_args(argv)
    if len(args.runs) > 2:
        parser.error(f"argument RUN: got {len(args.runs)} runs, expected one or two")
    for run in args.runs:
        if not is_remote(run) and not os.path.isdir(run):
            what = "a file, expected the folder of its run" if os.path.isfile(run) else "no such folder"
            raise UserError(f"{run or 'RUN'}: {what}")
    check_output("--out", args.out, ".html", 'content="sit_composer.report"')
    return args


def run(args: argparse.Namespace) -> None:
    """Reads the runs' folders, and writes the page."""
    load("torch")
    from sit_composer.page import report_page  # loads torch, for what tells a checkpoint from other files
    from sit_composer.storage import open_run_folder  # likewise late, for its requests' library

    write_bytes(report_page([open_run_folder(run) for run in args.runs]), Path(args.out))
    print(args.out)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake that it names."""
    return run_command(lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
