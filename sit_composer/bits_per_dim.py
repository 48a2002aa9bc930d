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
import json
import math
import os
import platform
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sit_composer.errors import UserError
from sit_composer.names import ADAPTIVE_METHODS, ODE_METHODS, choose
from sit_composer.outputs import check_output, holds_key
from sit_composer.spec import DataSpec

EXACT_DIMS = 4096  # the most for which an evaluation of the field may take a backward pass a dimension


@dataclass(frozen=True)
class Solve:
    """How log p is taken. What the solver doesn't use is None."""

    sampling_method: str = "dopri5"
    num_steps: int | None = None  # of a fixed-step solver
    atol: float | None = 1e-5  # of an adaptive one
    rtol: float | None = 1e-5
    probes: int | None = 1
    exact: bool = False  # the whole trace instead of probes
    seed: int = 0


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
        result = run(args)
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


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The result: bits a dimension, and what they depend on; written to ``args.out`` if that is given.

    Raises:
        UserError: for a checkpoint or data that can't be used, or don't fit each other.
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    from sit_composer.autoencoder import load_autoencoder
    from sit_composer.checkpoint import load_checkpoint
    from sit_composer.data import build_loader, load_spec
    from sit_composer.gallery import write_json
    from sit_composer.likelihood import bits_per_dim
    from sit_composer.sample import build_network, describe
    from sit_composer.transport import Transport

    device = "cuda" if torch.cuda.is_available() else "cpu"
    solve = solve_of(args)
    spec = load_spec(None, args.data)
    checkpoint = load_checkpoint(args.checkpoint, args.weights)
    record = checkpoint.record
    side, channels = record["model"]["input_size"], record["model"]["in_channels"]
    dims = channels * side**2
    if solve.exact and dims > EXACT_DIMS:
        raise UserError(f"--exact: the network has {dims} dimensions; it takes {EXACT_DIMS} at most: use --probes")
    check_fit(args, record, spec)
    encoder = None
    if spec.kind == "pixels" and record["autoencoder"]["name"] is not None:
        encoder = load_autoencoder(record["autoencoder"]["name"], channels, device)
        if encoder.spec.as_dict() != record["autoencoder"]:
            raise UserError(
                f"{args.checkpoint}: trained on latents of {record['autoencoder']}, and the autoencoder of that name "
                f"is now {encoder.spec.as_dict()}"
            )
        spec = DataSpec(**vars(spec) | {"channels": encoder.picture_channels})
    if args.num_images is not None and args.num_images > spec.samples:
        raise UserError(f"--num-images: got {args.num_images}; {args.data} has {spec.samples}")
    # Drawn, and not the first ones: shards often have one class after another.
    indices = range(spec.samples)
    if args.num_images is not None:
        drawn = np.random.default_rng(args.seed).choice(spec.samples, args.num_images, replace=False)
        indices = sorted(drawn.tolist())

    size = side * record["autoencoder"]["downsample"] if spec.kind == "pixels" else None
    pictures = build_loader(None, args.data, spec=spec, batch_size=args.batch_size, image_size=size, shuffle=False)
    network, transport = build_network(checkpoint, device), Transport(**record["transport"])
    log_p: list[float] = []
    evaluations = 0  # summed over the pictures
    with tqdm(total=len(indices), unit="img", desc="log p", disable=None) as bar:
        for start in range(0, len(indices), args.batch_size):
            numbers = indices[start : start + args.batch_size]
            samples = [pictures.dataset[i] for i in numbers]  # by number: a loader pads an epoch, and has its own order
            generators = [np.random.default_rng((solve.seed, i)) for i in numbers]
            x = network_input(samples, generators, record, encoder).to(device)
            if x.shape[1:] != (channels, side, side):
                raise UserError(f"{args.data}: makes {tuple(x.shape[1:])}; the network takes {(channels, side, side)}")
            labels = torch.tensor([sample["label"] for sample in samples], device=device)
            values, used = log_p_of(transport, network, x, labels, generators, solve)
            log_p += values
            evaluations += used * len(numbers)
            bar.update(len(numbers))

    levels = 127.5 if record["autoencoder"]["name"] is None else 1.0
    bits = bits_per_dim(torch.tensor(log_p, dtype=torch.float64), dims, levels).tolist()
    result = {
        "bits_per_dim": statistics.fmean(bits),
        "standard_error": statistics.stdev(bits) / math.sqrt(len(bits)) if len(bits) > 1 else None,
        "nats": statistics.fmean(log_p),
        "dims": dims,
        "of": "8-bit pictures" if levels == 127.5 else "latents, not pictures",
        "data": {"path": args.data, "count": len(bits), "of": spec.samples, "kind": spec.kind, "image_size": size},
        "settings": {
            "mode": args.mode,
            **asdict(solve),
            "interval": transport.interval(eval=True),
            "dequantization": "uniform, (l + u - 1/2) / 127.5 - 1" if levels == 127.5 else None,
            "batch_size": args.batch_size,
        },
        "evaluations": evaluations / len(bits),
        "checkpoint": describe(checkpoint),
        **{name: record[name] for name in ("model", "transport", "autoencoder")},
        "versions": versions(),
        "pictures": list(indices),
        "log_p": log_p,
    }
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(result, Path(args.out))
    return result


def check_fit(args: argparse.Namespace, record: dict[str, Any], spec: DataSpec) -> None:
    """Checks that the shards hold what the network was trained on.

    Raises:
        UserError: naming both.
    """
    ours, theirs = record["classes"], spec.classes
    numbers = [str(label) for label in range(len(ours))]  # as names they tell no more than how many there are
    if len(ours) != len(theirs) or (ours != theirs and numbers not in (ours, theirs)):
        differ = next((pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]), None)
        detail = f": for {differ[0]!r} there is {differ[1]!r}" if differ and len(ours) == len(theirs) else ""
        raise UserError(f"{args.data}: has {len(theirs)} classes, and {args.checkpoint} is of {len(ours)}{detail}")
    autoencoder, model = record["autoencoder"], record["model"]
    if spec.kind == "latents" and spec.autoencoder != autoencoder:
        wanted = "pixels" if autoencoder["name"] is None else f"latents of {json.dumps(autoencoder)}"
        raise UserError(
            f"{args.data}: latents of {json.dumps(spec.autoencoder)}; {args.checkpoint} was trained on {wanted}"
        )
    if autoencoder["name"] is None and spec.channels != model["in_channels"]:
        raise UserError(
            f"{args.data}: pictures of {spec.channels} channels; {args.checkpoint} is of {model['in_channels']}"
        )
    side = model["input_size"] * autoencoder["downsample"]
    # As in training, pictures are cropped for an encoder; levels that resizing made are not the data's.
    cropped = spec.kind == "pixels" and (autoencoder["name"] is not None or spec.image_size is None)
    if spec.image_size != side and not cropped:
        raise UserError(
            f"{args.data}: {spec.kind} of pictures of {spec.image_size}; {args.checkpoint} is of pictures of {side}"
        )


def network_input(samples: list[dict[str, Any]], generators: list[Any], record: dict[str, Any], encoder: Any) -> Any:
    """What the network models (N, C, H, W), of samples of `data.SitDataset`, with noise of each picture's generator."""
    import numpy as np
    import torch

    from sit_composer.autoencoder import AutoencoderSpec, from_uint8
    from sit_composer.likelihood import dequantize

    spec = AutoencoderSpec(**record["autoencoder"])
    if spec.name is None:
        levels = torch.stack([sample["image"] for sample in samples])
        noise = [g.random(levels.shape[1:], dtype=np.float32) for g in generators]
        return dequantize(levels, torch.from_numpy(np.stack(noise)))
    if encoder is not None:
        moments = encoder.moments(from_uint8(torch.stack([sample["image"] for sample in samples])))
    else:
        moments = torch.stack([sample["moments"] for sample in samples]).float()
    shape = (spec.channels, *moments.shape[2:])
    noise = np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators])
    return spec.latents(moments, torch.from_numpy(noise).to(moments.device))


def log_p_of(
    transport: Any, network: Any, x: Any, labels: Any, generators: list[Any], solve: Solve
) -> tuple[list[float], int]:
    """log p of each x (N, C, H, W) given its label, in nats, and the evaluations of the field that the solver took.

    Raises:
        UserError: if the solver gives up, or numbers that aren't finite.
    """
    import numpy as np
    import torch

    from sit_composer.likelihood import log_likelihood
    from sit_composer.samplers import Counted

    noise = None
    if not solve.exact:
        signs = [g.integers(0, 2, (solve.probes, *x.shape[1:]), dtype=np.int8) * 2 - 1 for g in generators]
        noise = torch.from_numpy(np.stack(signs, axis=1))  # (probes, N, C, H, W)
    names = ("num_steps", "atol", "rtol", "probes")
    options = {name: getattr(solve, name) for name in names if getattr(solve, name) is not None}
    model = Counted(network)
    try:
        values = log_likelihood(
            transport,
            model,
            x,
            sampling_method=solve.sampling_method,
            exact=solve.exact,
            noise=noise,
            y=labels,
            **options,
        )
    except AssertionError as error:  # torchdiffeq's
        raise UserError(f"the solver gave up ({error}); try a larger --atol or --rtol") from error
    if not values.isfinite().all():
        raise UserError("log p is NaN or infinite; try more steps, or another solver")
    return values.tolist(), model.evaluations


def summary(result: dict[str, Any]) -> str:
    """The result in one line."""
    data, settings, error = result["data"], result["settings"], result["standard_error"]
    value = f"{result['bits_per_dim']:.4f}" + ("" if error is None else f" ± {error:.4f}")
    trace = "exact trace" if settings["exact"] else f"{settings['probes']} probe{'s' * (settings['probes'] > 1)}"
    cost = f"{settings['sampling_method']}, {result['evaluations']:.0f} evaluations, {trace}"
    return f"{value} bits/dim of {result['of']} ({data['count']} of {data['of']}; {cost})"


def versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("sit-composer", "torch", "torchdiffeq", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


if __name__ == "__main__":
    sys.exit(main())
