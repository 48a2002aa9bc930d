"""Draws pictures from a trained SiT:   python -m sit_composer.sample CHECKPOINT --out DIR

Writes DIR/000000.png and so on, DIR/grid.png, and DIR/sampling.json, which records every setting, and how many
evaluations of the field and passes of networks a picture took, on average. Picture i depends on the seed and on i, and
not on the batch size, but for the tolerance of an adaptive solver, which takes the same steps for a batch. Run again,
it continues with what is missing. On several GPUs:   composer -n N -m sit_composer.sample CHECKPOINT --out DIR
"""

import argparse
import math
import sys

from sit_composer.choices import ADAPTIVE_METHODS, DIFFUSION_FORMS, LAST_STEPS, ODE_METHODS, SDE_METHODS, Sampling
from sit_composer.errors import UserError
from sit_composer.outputs import check_output, holds_arrays

DTYPES = ("float32", "bfloat16", "float16")
# Without defaults on the command line, so that one which would have no effect is seen; `Sampling` has them.
OPTIONAL = ("cfg_interval", "atol", "rtol", "diffusion_form", "diffusion_norm", "last_step", "last_step_size")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sit_composer.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's checkpoint file, or the folder of them")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the pictures go")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--classes", metavar="A,B,…", help="labels or class names to draw, --per-class of each")
    what.add_argument("--num-images", type=int, metavar="N", help="draw N, the classes equally often (16)")
    policies = "the classes of --num-images: equally often, or drawn at random (equal)"
    parser.add_argument("--labels", choices=("equal", "random"), default="equal", help=policies)
    parser.add_argument("--per-class", type=int, metavar="K", help="pictures of each of --classes (1)")
    parser.add_argument("--weights", choices=("ema", "training"), default="ema", help="(ema)")
    parser.add_argument("--cfg-scale", type=float, help="guidance; 1 is none (4, or 1 without a null class)")
    parser.add_argument(
        "--cfg-channels", type=int, metavar="C", help="guide only the first C, the release 3 of 4 (all)"
    )
    both = {"type": float, "nargs": 2, "metavar": ("FROM", "TO")}
    parser.add_argument("--cfg-interval", **both, help="guide within these times; data is at 1 (0 1)")
    parser.add_argument("--guide", metavar="CHECKPOINT", help="guide away from this weaker network, not the null class")
    parser.add_argument("--mode", choices=("ODE", "SDE"), default="ODE", help="(ODE)")
    methods = f"ODE: {', '.join(ODE_METHODS)} (dopri5); SDE: {', '.join(SDE_METHODS)} (Euler)"
    parser.add_argument("--sampling-method", metavar="NAME", help=methods)
    steps = "time points (ODE 50, SDE 250); an adaptive ODE solver chooses its own steps"
    parser.add_argument("--num-steps", type=int, metavar="N", help=steps)
    parser.add_argument("--atol", type=float, help="of adaptive ODE solvers (1e-6)")
    parser.add_argument("--rtol", type=float, help="of adaptive ODE solvers (1e-3)")
    parser.add_argument("--diffusion-form", choices=DIFFUSION_FORMS, help="of the SDE (sigma)")
    parser.add_argument("--diffusion-norm", type=float, help="of the SDE (1)")
    last_steps = [str(name) for name in LAST_STEPS]
    parser.add_argument("--last-step", choices=last_steps, help="of the SDE (Mean)")
    parser.add_argument("--last-step-size", type=float, help="of the SDE (0.04)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at a time (64)")
    parser.add_argument("--decode-dtype", choices=DTYPES, help="in which the autoencoder decodes latents (float32)")
    parser.add_argument("--decode-batch-size", type=int, metavar="N", help="latents that it decodes at a time (8)")
    parser.add_argument("--npz", metavar="FILE", help="write all pictures as one array too: arr_0, uint8, N×H×W×3")
    args = parser.parse_args(argv)
    for name, least in (
        ("num_images", 1),
        ("cfg_channels", 1),
        ("per_class", 1),
        ("batch_size", 1),
        ("decode_batch_size", 1),
        ("num_steps", 2),
        ("seed", 0),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"argument --{name.replace('_', '-')}: got {value}; it takes {least} or more")
    floats = {"cfg_scale": 0, "atol": 0, "rtol": 0, "diffusion_norm": 0, "last_step_size": 0}
    for name, least in floats.items():
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            parser.error(f"argument --{name.replace('_', '-')}: got {value}; it takes a number, {least} or more")
    try:
        check_output("argument --npz", args.npz, "", holds_arrays("arr_0", "labels"))
    except UserError as error:
        parser.error(str(error))
    methods = ODE_METHODS if args.mode == "ODE" else SDE_METHODS
    args.sampling_method = args.sampling_method or ("dopri5" if args.mode == "ODE" else "Euler")
    if args.sampling_method not in methods:
        parser.error(f"argument --sampling-method: got {args.sampling_method}; {args.mode} takes {', '.join(methods)}")
    refuse_idle(parser, args)
    for name in OPTIONAL:
        if getattr(args, name) is None:
            setattr(args, name, getattr(Sampling, name))
    args.per_class = args.per_class or 1
    if args.atol == args.rtol == 0:
        parser.error("argument --atol: got 0, and --rtol too; one of them takes more")
    args.cfg_interval = tuple(args.cfg_interval)
    # The authors' command takes it with any solver, too.
    args.idle_steps = args.sampling_method in ADAPTIVE_METHODS and args.num_steps is not None
    args.num_steps = args.num_steps or (50 if args.mode == "ODE" else 250)
    args.last_step = None if args.last_step == "None" else args.last_step
    return args


def refuse_idle(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the command for an option that would have no effect."""
    adaptive = args.sampling_method in ADAPTIVE_METHODS
    guided = ("guide", "cfg_interval", "cfg_channels")
    for names, goes, what in (
        (("per_class",), args.classes is not None, "--classes"),
        (("diffusion_form", "diffusion_norm", "last_step", "last_step_size"), args.mode == "SDE", "--mode SDE"),
        (("atol", "rtol"), adaptive, f"an adaptive ODE solver ({', '.join(ADAPTIVE_METHODS)})"),
        (("last_step_size",), args.last_step != "None", "a --last-step"),
        (guided, args.cfg_scale != 1, "a --cfg-scale other than 1"),
    ):
        for name in names:
            if getattr(args, name) is not None and not goes:
                parser.error(f"argument --{name.replace('_', '-')}: goes with {what}")
    if args.labels == "random" and args.classes is not None:
        parser.error("argument --labels: random goes with --num-images")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 when all pictures are there, 2 for a mistake that it names."""
    args = parse(argv)
    try:
        from sit_composer.gallery import run  # torch: only once the options are right

        run(args)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
