"""Draws pictures from a trained SiT:   python -m sit_composer.sample CHECKPOINT --out DIR

Writes DIR/000000.png and so on, DIR/grid.png, and DIR/sampling.json, which records every setting, and how many
evaluations of the field and passes of networks a picture took, on average. Picture i depends on the seed and on i, and
not on the batch size, but for the tolerance of an adaptive solver, which takes the same steps for a batch. Run again,
it continues with what is missing. On several GPUs:   composer -n N -m sit_composer.sample CHECKPOINT --out DIR
"""

import argparse
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sit_composer.errors import UserError
from sit_composer.generate import Sampling, Work, generate
from sit_composer.names import ADAPTIVE_METHODS, DIFFUSION_FORMS, LAST_STEPS, ODE_METHODS, SDE_METHODS
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
        run(args)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Draws what is asked for and not there yet; each rank of a launcher its share.

    Raises:
        UserError: for a checkpoint, class or setting that can't be used.
    """
    import torch
    import torch.distributed as dist
    from tqdm import tqdm

    from sit_composer.autoencoder import SLICE_SIZE, load_autoencoder, to_uint8
    from sit_composer.checkpoint import load_checkpoint
    from sit_composer.gallery import SETTINGS, claim, read_pictures, write_grid, write_json, write_npz, write_png
    from sit_composer.guidance import Guidance
    from sit_composer.transport import Transport

    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    checkpoint = load_checkpoint(args.checkpoint, args.weights)
    record = checkpoint.record
    network = build_network(checkpoint, device)
    guide = weaker = None
    if args.guide:
        weaker = load_checkpoint(args.guide, args.weights)
        for name in ("input_size", "in_channels", "num_classes"):
            theirs, ours = weaker.record["model"][name], record["model"][name]
            if theirs != ours:
                raise UserError(f"--guide: {args.guide} has {name} {theirs}, and {args.checkpoint} has {ours}")
        for part, names in (("transport", ("path_type", "prediction")), ("autoencoder", record["autoencoder"])):
            for name in names:
                theirs, ours = weaker.record[part].get(name), record[part][name]
                if theirs != ours:
                    raise UserError(f"--guide: {args.guide} has {part}.{name} {theirs}, {args.checkpoint} has {ours}")
        if weaker.record["classes"] != record["classes"]:
            raise UserError(f"--guide: {args.guide} has other classes than {args.checkpoint}, or in another order")
        guide = build_network(weaker, device)
    if args.cfg_scale is None:
        args.cfg_scale = 1.0 if network.null_label is None and guide is None else 4.0
    if args.cfg_channels is None:
        args.cfg_channels = record.get("cfg_channels")  # released weights are guided as released
    for name, default in (("decode_dtype", "float32"), ("decode_batch_size", SLICE_SIZE)):
        value = getattr(args, name)
        if record["autoencoder"]["name"] is not None:
            setattr(args, name, value or default)
        elif value is not None:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: got {value}; {args.checkpoint} draws pixels, which nothing decodes")
    sampling = Sampling(**{name: getattr(args, name) for name in Sampling.__dataclass_fields__})
    guidance = Guidance(network, sampling.cfg_scale, sampling.cfg_channels, sampling.cfg_interval, guide)
    labels = choose_labels(args, record["classes"])
    settings = {
        "checkpoint": describe(checkpoint),
        "guide": describe(weaker) if weaker else None,
        **asdict(sampling),
        "labels": labels,
        **{name: record[name] for name in ("model", "transport", "autoencoder")},
        "decode_dtype": args.decode_dtype,
    }
    out = Path(args.out)
    if ranks > 1:
        dist.init_process_group("gloo")
    todo: list[list[int] | UserError | None] = [None]
    if rank == 0:
        try:
            todo = [claim(out, settings, len(labels))]
        except (UserError, OSError) as error:
            todo = [error if isinstance(error, UserError) else UserError(f"--out: {error}")]
    if ranks > 1:
        dist.broadcast_object_list(todo)
    if isinstance(todo[0], UserError):
        raise todo[0]
    missing = todo[0][rank::ranks]
    if args.idle_steps and rank == 0:
        print(f"note: {sampling.sampling_method} chooses its own steps; --num-steps has no effect", file=sys.stderr)
    if todo[0]:
        transport = Transport(**record["transport"])
        known = record["autoencoder"]
        vae = {}
        if known["name"] is not None:
            vae = {"dtype": getattr(torch, args.decode_dtype), "slice_size": args.decode_batch_size}
        autoencoder = load_autoencoder(known["name"], known["channels"], device, **vae)
        if autoencoder.spec.as_dict() != known:
            raise UserError(
                f"{args.checkpoint}: trained on latents of {known}, and the autoencoder of that name is now "
                f"{autoencoder.spec.as_dict()}"
            )
        settings["decode_batch_size"] = args.decode_batch_size
        drawn, before = Work(), Work()
        if rank == 0:
            before = Work.of_earlier(out / SETTINGS, len(labels) - len(todo[0]))
        with tqdm(total=len(missing), unit="img", desc="sampling", disable=True if rank > 0 else None) as bar:
            for start in range(0, len(missing), args.batch_size):
                indices = missing[start : start + args.batch_size]
                latents, used = generate(guidance, transport, [labels[i] for i in indices], indices, sampling)
                for i, picture in zip(indices, to_uint8(autoencoder.decode(latents)).cpu(), strict=True):
                    write_png(picture, out / f"{i:06d}.png")
                bar.update(len(indices))
                drawn += Work(len(indices), **{name: count * len(indices) for name, count in used.items()})
                if rank == 0:  # what is known, should it be stopped
                    write_json({**settings, **(before + drawn).means()}, out / SETTINGS)
        works = [drawn] * ranks
        if ranks > 1:
            # The last that ranks say to each other. The group is not destroyed: while that holds the GIL, Gloo's thread
            # may want it to free what was gathered, and both wait for ever (seen with torch 2.7.0).
            dist.all_gather_object(works, drawn)
        if rank == 0:
            write_json({**settings, **sum(works, before).means()}, out / SETTINGS)
    if rank == 0:
        pictures = read_pictures(out, len(labels))
        if args.npz:
            write_npz(pictures, labels, Path(args.npz))
        write_grid(pictures, labels, out / "grid.png")
        print(out / "grid.png")


def build_network(checkpoint: Any, device: str) -> Any:
    """The network that a checkpoint's weights fit, ready to be evaluated."""
    from sit_composer.sit import SiT

    network = SiT(**checkpoint.record["model"])
    network.load_state_dict(checkpoint.weights)
    return network.to(device).eval().requires_grad_(False)


def describe(checkpoint: Any) -> dict[str, Any]:
    """What identifies a checkpoint's weights."""
    from sit_composer.checkpoint import digest

    return {
        "path": checkpoint.source,
        "step": checkpoint.step,
        "sha256": digest(checkpoint.path),
        "weights": checkpoint.which,
    }


def choose_labels(args: argparse.Namespace, classes: list[str]) -> list[int]:
    """The label of each picture to draw, in order of the classes.

    Raises:
        UserError: for a class that there isn't.
    """
    if args.classes is None:
        count = args.num_images or 16
        if args.labels == "random":
            import numpy as np

            return np.random.default_rng((args.seed, count)).integers(len(classes), size=count).tolist()
        return [i * len(classes) // count for i in range(count)]
    labels = []
    for name in args.classes.split(","):
        name = name.strip()
        label = classes.index(name) if name in classes else int(name) if name.isdecimal() else -1
        if not 0 <= label < len(classes):
            raise UserError(f"--classes: got {name!r}; it takes labels 0 to {len(classes) - 1}, or the classes' names")
        labels += [label] * args.per_class
    return labels


if __name__ == "__main__":
    sys.exit(main())
