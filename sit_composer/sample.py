"""Generates images with a trained SiT:   python -m sit_composer.sample CHECKPOINT --out DIR

Writes DIR/000000.png and so on, DIR/grid.png, and DIR/sampling.json, which records every setting, and how many
evaluations of the field and passes of networks an image took on average. Image i depends on the seed and on i, and not
on the batch size, except for the tolerance of an adaptive solver, which takes the same steps for a whole batch. Rerun
the same command to generate missing images. On several GPUs:
composer -n N -m sit_composer.sample CHECKPOINT --out DIR
"""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from sit_composer import choices, cli
from sit_composer.bounds import choose
from sit_composer.choices import Sampling
from sit_composer.cli import Rule, check_checkpoint, hand_over, list_of, make_parser, number, refuse_idle, run_command
from sit_composer.errors import UserError
from sit_composer.outputs import check_local, check_output

# Without defaults on the command line, to notice an option that has no effect; `Sampling` has the defaults.
SDE_ONLY = ("diffusion_form", "diffusion_norm", "last_step", "last_step_size")
AXES = ("weights", "sampling_method", "num_steps", "cfg_scale", "time_shift", "seed")  # of sit_composer.sweep
OPTIONAL = ("cfg_interval", "atol", "rtol", *SDE_ONLY)


def make_options(prog: str, doc: str | None, several: bool = False) -> argparse.ArgumentParser:
    """The options of sampling; with ``several``, those of `AXES` take lists of values."""
    parser = make_parser(prog, doc)
    option = parser.add_argument

    def axis(name: str, **how: Any) -> None:
        if several:
            how = {**how, "type": list_of(how.get("type", str)), "metavar": "A,B,…"}
            how["default"] = [how["default"]] if "default" in how else None
        option(name, **how)

    count, not_negative = number(choices.COUNT), number(choices.NOT_NEGATIVE)
    option("checkpoint", metavar="CHECKPOINT", help="a run's checkpoint file, or the folder of them")
    option("--out", required=True, metavar="DIR", help="folder for the " + ("results" if several else "images"))
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--classes", metavar="A,B,…", help="labels or class names, --per-class images of each")
    images.add_argument("--num-images", type=count, metavar="N", help="N images, the classes equally often (16)")
    policies = "the classes of --num-images: equally often, or random (equal)"
    option("--labels", choices=("equal", "random"), default="equal", help=policies)
    option("--per-class", type=count, metavar="K", help="images of each of --classes (1)")
    axis("--weights", default="ema", metavar="NAME", help=choices.WEIGHTS_HELP)
    axis("--cfg-scale", type=not_negative, help="guidance; 1 is none (4, or 1 without a null class)")
    option("--cfg-channels", type=count, metavar="C", help="guide only the first C, the release 3 of 4 (all)")
    option("--cfg-interval", type=float, nargs=2, metavar=("FROM", "TO"), help="guide in these times; data: 1 (0 1)")
    option("--guide", metavar="CHECKPOINT", help="guide away from this weaker network, not from the null class")
    option("--guide-weights", metavar="NAME", help="the guide's (training if --weights is, else ema)")
    option("--mode", choices=("ODE", "SDE"), default="ODE", help="(ODE)")
    methods = f"ODE: {', '.join(choices.ODE_METHODS)} (dopri5); SDE: {', '.join(choices.SDE_METHODS)} (Euler)"
    axis("--sampling-method", metavar="NAME", help=methods)
    steps = "time points (ODE 50, SDE 250); an adaptive ODE solver chooses its own steps"
    axis("--num-steps", type=number(choices.TIME_POINTS), metavar="N", help=steps)
    shifted = "shorter steps near the noise (above 1) or the data (below 1), of a fixed-step solver; "
    shifted += "auto: √(dimensions / 4096) (auto if the network was trained with auto, else 1)"
    axis("--time-shift", type=number(choices.SHIFT), metavar="S|auto", help=shifted)
    option("--atol", type=not_negative, help="of adaptive ODE solvers (1e-6)")
    option("--rtol", type=not_negative, help="of adaptive ODE solvers (1e-3)")
    option("--diffusion-form", choices=choices.DIFFUSION_FORMS, help="of the SDE (sigma)")
    option("--diffusion-norm", type=not_negative, help="of the SDE (1)")
    option("--last-step", choices=[str(name) for name in choices.LAST_STEPS], help="of the SDE (Mean)")
    option("--last-step-size", type=not_negative, help="of the SDE (0.04)")
    axis("--seed", type=number(choices.FROM_ZERO), default=0, help="(0)")
    option("--batch-size", type=count, default=64, help="images per batch (64)")
    precisions = "of the network; auto is bf16 where the processor or the GPU is faster with it (fp32)"
    option("--precision", choices=choices.PRECISIONS, default="fp32", help=precisions)
    option("--decode-dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the decoder (float32)")
    option("--decode-batch-size", type=count, metavar="N", help="latents per batch of the decoder (8)")
    if not several:
        option("--npz", metavar="FILE", help="write all images as one array too: arr_0, uint8, N×H×W×3")
    return parser


def parse(argv: list[str] | None, refuse: Callable[[str], NoReturn] | None = None) -> argparse.Namespace:
    """The options with their defaults; those that depend on the checkpoint are None if not given.

    A mistake exits, or goes to ``refuse``, which may raise it instead.
    """
    parser = make_options("python -m sit_composer.sample", __doc__)
    if refuse:
        parser.error = refuse  # type: ignore[method-assign, assignment]
    args = parser.parse_args(argv)
    check_output("--npz", args.npz, "", "arr_0", "labels")
    refuse_idle(parser, args, *rules(args))
    return settle(args)


def rules(args: argparse.Namespace) -> list[Rule]:
    """Which options have an effect beside the others; sets the solver, and checks the names of options."""
    check_local("--out", args.out)
    choices.check_weights("--weights", args.weights)
    choices.check_weights("--guide-weights", args.guide_weights or "ema")
    ode = args.mode == "ODE"
    methods = choices.ODE_METHODS if ode else choices.SDE_METHODS
    args.sampling_method = args.sampling_method or ("dopri5" if ode else "Euler")
    choose(f"--sampling-method of the {args.mode}", args.sampling_method, methods)
    if args.labels == "random" and args.classes is not None:
        raise UserError("argument --labels: random has no effect without --num-images")
    adaptive = args.sampling_method in choices.ADAPTIVE_METHODS
    return [
        ("per_class", args.classes is not None, "without --classes"),
        ("diffusion_form diffusion_norm last_step last_step_size", not ode, "without --mode SDE"),
        ("atol rtol", adaptive, f"without an adaptive ODE solver ({', '.join(choices.ADAPTIVE_METHODS)})"),
        ("time_shift", not ode or not adaptive, f"with {args.sampling_method}, which chooses its own steps"),
        ("last_step_size", args.last_step != "None", "without a --last-step"),
        ("guide_weights", args.guide is not None, "without --guide"),
        ("guide cfg_interval cfg_channels", args.cfg_scale != 1, "with --cfg-scale 1"),
    ]


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """The options, of which all have an effect, with their defaults."""
    for name in OPTIONAL:
        if getattr(args, name) is None:
            setattr(args, name, getattr(Sampling, name))
    args.per_class = args.per_class or 1
    args.guide_weights = args.guide_weights or ("training" if args.weights == "training" else "ema")
    choices.check_tolerances(args.atol, args.rtol, "--")
    args.cfg_interval = tuple(args.cfg_interval)
    choices.check_interval(args.cfg_interval, "--cfg-interval")
    adaptive = args.sampling_method in choices.ADAPTIVE_METHODS
    args.idle_steps = adaptive and args.num_steps is not None  # only a note: the authors' command allows it, too
    args.num_steps = args.num_steps or (50 if args.mode == "ODE" else 250)
    if adaptive:
        args.time_shift = 1.0
    args.last_step = None if args.last_step == "None" else args.last_step
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 if all images exist, 2 for a mistake that it names."""
    module = "sit_composer.gallery"
    return run_command(lambda: hand_over(module, check_checkpoint(parse(argv)), "torch"), "stopped; rerun to continue")


if __name__ == "__main__":
    cli.leave(main)
