"""How probable real images are to a trained SiT:   python -m sit_composer.bits_per_dim CHECKPOINT --data SHARDS

Computes log p of the images in a folder of MDS shards, each given its class, by the probability-flow ODE, and prints
their mean in bits per dimension. --out FILE.json keeps it with every setting and each image's own value.

For a network that works on pixels, uniform noise over each level's interval is added to the levels, so that the density
becomes a bound on the probability of 8-bit images: bits per dimension on the scale of 0 to 255, comparable with other
models' on the same images. A network that works on latents has a density of latents: its bits don't describe images,
and compare only with another network's on latents of the same autoencoder. Latents are sampled from the autoencoder's
posterior.

The noise of image i depends on the seed and on i alone, so its value doesn't depend on the batch size (except for the
tolerance of an adaptive solver, which takes the same steps for a whole batch).

Only the ODE has a likelihood: along the SDE's paths the density doesn't follow from the field's divergence. There is no
guidance, either: a guided field leads to a density that is neither the network's p(x | y) nor of a known form.
"""

import argparse
import os
import sys

from sit_composer import choices
from sit_composer.bounds import choose
from sit_composer.cli import check_checkpoint, hand_over, make_parser, number, refuse_idle, run_command
from sit_composer.errors import UserError
from sit_composer.outputs import check_output


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; ``solve`` holds those of the solver, with their defaults."""
    parser = make_parser("python -m sit_composer.bits_per_dim", __doc__)
    count, positive, points = map(number, (choices.COUNT, choices.POSITIVE, choices.TIME_POINTS))
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's checkpoint file, or the folder of them")
    parser.add_argument("--data", required=True, metavar="SHARDS", help="a folder of MDS shards")
    parser.add_argument("--weights", default="ema", metavar="NAME", help=choices.WEIGHTS_HELP)
    parser.add_argument("--num-images", type=count, metavar="N", help="N of the images, chosen by the seed (all)")
    methods = f"of {', '.join(choices.ODE_METHODS)} (dopri5)"
    parser.add_argument("--sampling-method", default="dopri5", metavar="NAME", help=methods)
    parser.add_argument("--num-steps", type=points, metavar="N", help="of a fixed-step solver (50)")
    parser.add_argument("--atol", type=positive, help="of an adaptive solver (1e-5)")
    parser.add_argument("--rtol", type=positive, help="of an adaptive solver (1e-5)")
    parser.add_argument("--probes", type=count, metavar="K", help="Hutchinson's, one backward pass each (1)")
    exact = f"the exact trace: one backward pass per dimension, for at most {choices.EXACT_DIMS}"
    parser.add_argument("--exact", action="store_true", help=exact)
    parser.add_argument("--batch-size", type=count, default=64, metavar="N", help="images per batch (64)")
    parser.add_argument("--seed", type=number(choices.FROM_ZERO), default=0, help="of the noise (0)")
    parser.add_argument("--out", metavar="FILE.json", help="write the result, and everything that it depends on")
    args = parser.parse_args(argv)
    choices.check_weights("--weights", args.weights)
    choose("--sampling-method", args.sampling_method, choices.ODE_METHODS)
    adaptive = args.sampling_method in choices.ADAPTIVE_METHODS
    refuse_idle(
        parser,
        args,
        ("atol rtol", adaptive, f"without an adaptive solver ({', '.join(choices.ADAPTIVE_METHODS)})"),
        ("num_steps", not adaptive, f"without a fixed-step solver ({', '.join(choices.FIXED_STEP_METHODS)})"),
        ("probes", not args.exact, "with --exact"),
    )
    check_output("--out", args.out, ".json", "bits_per_dim")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("WORLD_SIZE: this command runs as one process; start it with python, not with a launcher")
    steps, atol, rtol = (None, args.atol or 1e-5, args.rtol or 1e-5) if adaptive else (args.num_steps or 50, None, None)
    probes = None if args.exact else args.probes or 1
    args.solve = choices.Solve(args.sampling_method, steps, atol, rtol, probes, exact=args.exact, seed=args.seed)
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake that it names."""
    module = "sit_composer.evaluation.bits"
    return run_command(lambda: hand_over(module, check_checkpoint(parse(argv)), "torch", "streaming"))


if __name__ == "__main__":
    sys.exit(main())
