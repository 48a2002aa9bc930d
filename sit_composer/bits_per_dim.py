"""How probable real pictures are to a trained SiT:   python -m sit_composer.bits_per_dim CHECKPOINT --data SHARDS

Takes log p of the pictures in a folder of MDS shards, each given its class, by the probability-flow ODE, and prints
their mean in bits a dimension. --out FILE.json keeps it with every setting and each picture's own value.

A network that works on pixels is given levels with uniform noise over each level's interval, so that its density
becomes a bound on the probability of 8-bit pictures: bits a dimension on the scale of 0 to 255, comparable with other
models' on the same pictures. A network that works on latents has a density of latents: its bits say nothing about
pictures, and compare only with another network's on latents of the same autoencoder. Latents are sampled from the
autoencoder's posterior.

The noise of picture i depends on the seed and on i alone, so its value doesn't depend on the batch size (but for the
tolerance of an adaptive solver, which takes the same steps for a batch).

Only the ODE has it: along the SDE's paths a density doesn't follow from the field's divergence. There is no guidance,
either: a guided field leads to a density that is neither the network's p(x | y) nor one of known form.
"""

import argparse
import math
import os
import sys
from typing import Any

from sit_composer.choices import ADAPTIVE_METHODS, EXACT_DIMS, ODE_METHODS, Solve, choose
from sit_composer.errors import UserError
from sit_composer.outputs import check_output, holds_key


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sit_composer.bits_per_dim",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's checkpoint file, or the folder of them")
    parser.add_argument("--data", required=True, metavar="SHARDS", help="a folder of MDS shards")
    parser.add_argument("--weights", choices=("ema", "training"), default="ema", help="(ema)")
    parser.add_argument("--num-images", type=int, metavar="N", help="N of the pictures, drawn by the seed (all)")
    parser.add_argument("--mode", default="ODE", help="ODE: there is no other likelihood")
    methods = f"of {', '.join(ODE_METHODS)} (dopri5)"
    parser.add_argument("--sampling-method", default="dopri5", metavar="NAME", help=methods)
    parser.add_argument("--num-steps", type=int, metavar="N", help="time points of a fixed-step solver (50)")
    parser.add_argument("--atol", type=float, help="of an adaptive solver (1e-5)")
    parser.add_argument("--rtol", type=float, help="of an adaptive solver (1e-5)")
    parser.add_argument("--probes", type=int, metavar="K", help="Hutchinson's, a backward pass each (1)")
    exact = f"the exact trace: a backward pass a dimension, of which there may be {EXACT_DIMS}"
    parser.add_argument("--exact", action="store_true", help=exact)
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="pictures at a time (64)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    parser.add_argument("--out", metavar="FILE.json", help="write the result, and all that it depends on")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake that it names."""
    args = parse(argv)
    try:
        check(args)
        from sit_composer.evaluation.bits import run  # torch: only once the options are right

        result = run(args, solve_of(args))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(result))
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuses options that are wrong, or that would have no effect.

    Raises:
        UserError: naming the option.
    """
    if args.mode != "ODE":
        raise UserError(f"--mode: got {args.mode}; only the ODE has a likelihood: leave it out, or take ODE")
    choose("--sampling-method", args.sampling_method, ODE_METHODS)
    adaptive = args.sampling_method in ADAPTIVE_METHODS
    for names, kind in ((("atol", "rtol"), "an adaptive"), (("num_steps",), "a fixed-step")):
        for name in names:
            if getattr(args, name) is not None and adaptive != (kind == "an adaptive"):
                raise UserError(f"--{name.replace('_', '-')}: goes with {kind} solver; {args.sampling_method} is none")
    if args.exact and args.probes is not None:
        raise UserError("--probes: goes without --exact, which takes none")
    least = {"num_images": 1, "num_steps": 2, "probes": 1, "batch_size": 1, "seed": 0}
    for name, value in least.items():
        if getattr(args, name) is not None and getattr(args, name) < value:
            raise UserError(f"--{name.replace('_', '-')}: got {getattr(args, name)}; it takes {value} or more")
    for name in ("atol", "rtol"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name}: got {value}; it takes a number above 0")
    check_output("--out", args.out, ".json", holds_key("bits_per_dim"))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("this command runs as one process; start it with python, not with a launcher")


def solve_of(args: argparse.Namespace) -> Solve:
    """The options with their defaults."""
    if args.sampling_method in ADAPTIVE_METHODS:
        solver = {"atol": args.atol or 1e-5, "rtol": args.rtol or 1e-5}
    else:
        solver = {"num_steps": args.num_steps or 50, "atol": None, "rtol": None}
    probes = None if args.exact else args.probes or 1
    return Solve(args.sampling_method, **solver, probes=probes, exact=args.exact, seed=args.seed)


def summary(result: dict[str, Any]) -> str:
    """The result in one line."""
    data, settings, error = result["data"], result["settings"], result["standard_error"]
    value = f"{result['bits_per_dim']:.4f}" + ("" if error is None else f" ± {error:.4f}")
    trace = "exact trace" if settings["exact"] else f"{settings['probes']} probe{'s' * (settings['probes'] > 1)}"
    cost = f"{settings['sampling_method']}, {result['evaluations']:.0f} evaluations, {trace}"
    return f"{value} bits/dim of {result['of']} ({data['count']} of {data['of']}; {cost})"


if __name__ == "__main__":
    sys.exit(main())
