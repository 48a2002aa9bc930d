"""Fréchet distance of ODE solvers at equal evaluations:   python tests/benchmarks/solvers.py --run DIR

Samples from the network of `evaluations.py`, in whose folder DIR the run, the reference and what is measured are (that
command makes it), without guidance and with it, by each fixed-step solver in at most 10, 25 and 50 evaluations of the
field, and prints a Markdown table. If interrupted, rerun the same command. The distances can't be compared with
published FIDs.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

from sit_composer.choices import Sampling

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder stands there instead
from tests.benchmarks.evaluations import Judge
from tests.benchmarks.time_sampling import spread

STAGES = {"euler": 1, "heun": 2, "midpoint": 2, "heun3": 3, "rk4": 4}  # evaluations of a step


def points(solver: str, most: int) -> int:
    """The time points of as many steps as take at most so many evaluations."""
    return most // STAGES[solver] + 1


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="the folder of evaluations.py")
    add("--solvers", nargs="+", choices=STAGES, default=list(STAGES), help="(all)")
    add("--evaluations", nargs="+", type=int, default=[10, 25, 50], metavar="N", help="at most so many (10 25 50)")
    add("--cfg-scales", nargs="+", type=float, default=[1.0, 1.5], metavar="S", help="(1 1.5)")
    add("--time-shifts", nargs="+", type=float, default=[1.0, 0.5], metavar="S", help="(1 0.5)")
    add("--images", type=int, default=500, metavar="N", help="per measurement (%(default)s)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="S", help="one measurement each (0 1 2)")
    args = parser.parse_args(argv)
    judge = Judge(args.run, args.images)
    heads = " | ".join(f"{n}, guidance {scale:g}" for scale in args.cfg_scales for n in args.evaluations)
    print(f"| solver | time shift | {heads} |\n| --- | ---: |" + " ---: |" * (heads.count("|") + 1))
    for solver in args.solvers:
        for shift in args.time_shifts:
            cells = []
            for scale in args.cfg_scales:
                for most in args.evaluations:
                    sampling = Sampling("ODE", solver, points(solver, most), scale)
                    found = [judge(replace(sampling, time_shift=shift), seed)["distance"] for seed in args.seeds]
                    cells.append(spread(mean(found), found, ".2f"))
            print(f"| {solver} | {shift:g} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # several small matrix products gain nothing from more
    sys.exit(main())
