"""Draws pictures from a trained SiT:   python -m sit_composer.sample CHECKPOINT --out DIR

Writes DIR/000000.png and so on, DIR/grid.png, and DIR/sampling.json, which records every setting and the number of
function evaluations. Picture i depends on the seed and on i alone, not on the batch size. Run again, it continues
with what is missing.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sit_composer.errors import UserError
from sit_composer.names import DIFFUSION_FORMS, LAST_STEPS, ODE_METHODS, SDE_METHODS

SETTINGS = "sampling.json"


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: the part of the settings that `generate` takes."""

    mode: str = "ODE"
    sampling_method: str = "dopri5"
    num_steps: int = 50
    cfg_scale: float = 1.0
    seed: int = 0
    atol: float = 1e-6
    rtol: float = 1e-3
    diffusion_form: str = "sigma"
    diffusion_norm: float = 1.0
    last_step: str | None = "Mean"
    last_step_size: float = 0.04


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sit_composer.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's checkpoint file, or the folder of them")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the pictures go")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--classes", metavar="A,B,…", help="labels or class names to draw, --per-class of each")
    what.add_argument("--num-images", type=int, metavar="N", help="draw N, the classes equally often (16)")
    parser.add_argument("--per-class", type=int, default=1, metavar="K", help="pictures of each of --classes (1)")
    parser.add_argument("--weights", choices=("ema", "training"), default="ema", help="(ema)")
    parser.add_argument("--cfg-scale", type=float, help="guidance; 1 is none (4, or 1 without a null class)")
    parser.add_argument("--mode", choices=("ODE", "SDE"), default="ODE", help="(ODE)")
    methods = f"ODE: {', '.join(ODE_METHODS)} (dopri5); SDE: {', '.join(SDE_METHODS)} (Euler)"
    parser.add_argument("--sampling-method", metavar="NAME", help=methods)
    parser.add_argument("--num-steps", type=int, metavar="N", help="time points (ODE 50, SDE 250)")
    parser.add_argument("--atol", type=float, default=1e-6, help="of adaptive ODE solvers (1e-6)")
    parser.add_argument("--rtol", type=float, default=1e-3, help="of adaptive ODE solvers (1e-3)")
    parser.add_argument("--diffusion-form", choices=DIFFUSION_FORMS, default="sigma", help="of the SDE (sigma)")
    parser.add_argument("--diffusion-norm", type=float, default=1.0, help="of the SDE (1)")
    last_steps = [str(name) for name in LAST_STEPS]
    parser.add_argument("--last-step", choices=last_steps, default="Mean", help="of the SDE (Mean)")
    parser.add_argument("--last-step-size", type=float, default=0.04, help="of the SDE (0.04)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at a time (64)")
    parser.add_argument("--npz", metavar="FILE", help="write all pictures as one array too: arr_0, uint8, N×H×W×3")
    args = parser.parse_args(argv)
    for name, least in (("num_images", 1), ("per_class", 1), ("batch_size", 1), ("num_steps", 2), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"argument --{name.replace('_', '-')}: got {value}; it takes {least} or more")
    methods = ODE_METHODS if args.mode == "ODE" else SDE_METHODS
    args.sampling_method = args.sampling_method or ("dopri5" if args.mode == "ODE" else "Euler")
    if args.sampling_method not in methods:
        parser.error(f"argument --sampling-method: got {args.sampling_method}; {args.mode} takes {', '.join(methods)}")
    args.num_steps = args.num_steps or (50 if args.mode == "ODE" else 250)
    args.last_step = None if args.last_step == "None" else args.last_step
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 when all pictures are there, 2 for a mistake that it names."""
    args = parse(argv)
    try:
        run(args)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Draws what is asked for and not there yet.

    Raises:
        UserError: for a checkpoint, class or setting that can't be used.
    """
    import torch
    from tqdm import tqdm

    from sit_composer.autoencoder import load_autoencoder, to_uint8
    from sit_composer.checkpoint import load_checkpoint
    from sit_composer.sit import SiT
    from sit_composer.transport import Transport

    checkpoint = load_checkpoint(args.checkpoint, args.weights)
    record = checkpoint.record
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = SiT(**record["model"])
    network.load_state_dict(checkpoint.weights)
    network.to(device).eval().requires_grad_(False)
    if args.cfg_scale is None:
        args.cfg_scale = 1.0 if network.null_label is None else 4.0
    sampling = Sampling(**{name: getattr(args, name) for name in Sampling.__dataclass_fields__})
    labels = choose_labels(args, record["classes"])

    out = Path(args.out)
    with open(checkpoint.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    settings = {
        "checkpoint": {"path": checkpoint.path, "step": checkpoint.step, "sha256": digest, "weights": checkpoint.which},
        **asdict(sampling),
        "labels": labels,
        **{name: record[name] for name in ("model", "transport", "autoencoder")},
    }
    missing = claim(out, settings, len(labels))
    if missing:
        transport = Transport(**record["transport"])
        autoencoder = load_autoencoder(record["autoencoder"]["name"], record["autoencoder"]["channels"], device)
        if autoencoder.spec.as_dict() != record["autoencoder"]:
            raise UserError(
                f"{args.checkpoint}: trained on latents of {record['autoencoder']}, and the autoencoder of that name "
                f"is now {autoencoder.spec.as_dict()}"
            )
        with tqdm(total=len(labels), initial=len(labels) - len(missing), unit="img", desc="sampling") as bar:
            for start in range(0, len(missing), args.batch_size):
                indices = missing[start : start + args.batch_size]
                latents, evaluations = generate(network, transport, [labels[i] for i in indices], indices, sampling)
                for i, picture in zip(indices, to_uint8(autoencoder.decode(latents)).cpu(), strict=True):
                    write_png(picture, out / f"{i:06d}.png")
                bar.update(len(indices))
                write_json({**settings, "evaluations": evaluations}, out / SETTINGS)
    pictures = read_pictures(out, len(labels))
    if args.npz:
        write_npz(pictures, labels, Path(args.npz))
    write_grid(pictures, labels, out / "grid.png")
    print(out / "grid.png")


def choose_labels(args: argparse.Namespace, classes: list[str]) -> list[int]:
    """The label of each picture to draw, in order of the classes.

    Raises:
        UserError: for a class that there isn't.
    """
    if args.classes is None:
        count = args.num_images or 16
        return [i * len(classes) // count for i in range(count)]
    labels = []
    for name in args.classes.split(","):
        name = name.strip()
        label = classes.index(name) if name in classes else int(name) if name.isdecimal() else -1
        if not 0 <= label < len(classes):
            raise UserError(f"--classes: got {name!r}; it takes labels 0 to {len(classes) - 1}, or the classes' names")
        labels += [label] * args.per_class
    return labels


def generate(
    network: Any, transport: Any, labels: list[int], indices: list[int], sampling: Sampling
) -> tuple[Any, int]:
    """Latents (N, C, H, W) for N labels, and how often the network was evaluated for each.

    The noise of the picture with index i comes from a generator of its own, seeded with (sampling.seed, i), so that it
    is the same picture whatever it is batched with. (An adaptive solver's steps do depend on the batch, within its
    tolerances.)
    """
    import numpy as np
    import torch

    from sit_composer.guidance import Guidance
    from sit_composer.samplers import Counted, sample_ode, sample_sde

    device = next(network.parameters()).device
    shape = (network.in_channels, network.input_size, network.input_size)
    # numpy's generators, as torch's on the CPU heeds only 32 bits of a seed.
    generators = [np.random.default_rng((sampling.seed, i)) for i in indices]

    def draw() -> torch.Tensor:
        noise = np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators])
        return torch.from_numpy(noise).to(device)

    model = Counted(Guidance(network, sampling.cfg_scale))
    common = {"sampling_method": sampling.sampling_method, "num_steps": sampling.num_steps}
    y = torch.tensor(labels, device=device)
    if sampling.mode == "ODE":
        x = sample_ode(transport, model, draw(), atol=sampling.atol, rtol=sampling.rtol, y=y, **common)
    else:
        sde = {name: getattr(sampling, name) for name in ("diffusion_form", "diffusion_norm", "last_step")}
        x = sample_sde(
            transport, model, draw(), last_step_size=sampling.last_step_size, draw=draw, y=y, **sde, **common
        )
    return x, model.evaluations


def claim(out: Path, settings: dict, count: int) -> list[int]:
    """Makes the folder ours, and gives the indices of the pictures that it lacks.

    Raises:
        UserError: if it holds something else, which is left as it is.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; it takes a folder")
    if out.is_dir() and any(out.iterdir()):
        try:
            before = json.loads((out / SETTINGS).read_text())
        except (OSError, ValueError):
            raise UserError(f"--out: {out} holds files that are not samples; choose another folder") from None
        for name, value in settings.items():
            if before.get(name) != json.loads(json.dumps(value)):
                raise UserError(f"--out: {out} holds samples with another {name}; choose another folder")
        return [i for i in range(count) if not (out / f"{i:06d}.png").exists()]
    out.mkdir(parents=True, exist_ok=True)
    write_json(settings, out / SETTINGS)
    return list(range(count))


def read_pictures(out: Path, count: int) -> list[Any]:
    """The pictures as PIL images."""
    from PIL import Image

    pictures = []
    for i in range(count):
        with Image.open(out / f"{i:06d}.png") as image:
            pictures.append(image.copy())
    return pictures


def write_png(picture: Any, path: Path) -> None:
    """Writes a uint8 (C, H, W) picture, all of it or nothing."""
    from torchvision.io import encode_png

    _write(path, bytes(encode_png(picture).numpy()))


def write_json(content: dict, path: Path) -> None:
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
    _write(path, f"{{\n{lines}\n}}\n".encode())


def write_npz(pictures: list[Any], labels: list[int], path: Path) -> None:
    """Writes the pictures as ADM's evaluation takes them: arr_0, uint8 (N, H, W, 3); the labels lie beside."""
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, arr_0=np.stack([np.asarray(p.convert("RGB")) for p in pictures]), labels=np.array(labels))
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, buffer.getvalue())


def write_grid(pictures: list[Any], labels: list[int], path: Path, columns: int = 10, rows: int = 10) -> None:
    """Writes a grid of the pictures, small ones enlarged: a row a class where there are several of each."""
    import io

    from PIL import Image

    classes = sorted(set(labels), key=labels.index)
    each = [[i for i, label in enumerate(labels) if label == c][:columns] for c in classes[:rows]]
    if len(each[0]) == 1:  # one of each: fill the rows
        flat = [row[0] for row in [[i for i, v in enumerate(labels) if v == c] for c in classes]][: rows * columns]
        width = math.ceil(math.sqrt(len(flat)))
        each = [flat[i : i + width] for i in range(0, len(flat), width)]
    side = pictures[0].width
    zoom = max(1, 48 // side)
    step = side * zoom + 2
    grid = Image.new(pictures[0].mode, (max(len(row) for row in each) * step - 2, len(each) * step - 2), "white")
    for y, row in enumerate(each):
        for x, i in enumerate(row):
            grid.paste(pictures[i].resize((side * zoom, side * zoom), Image.NEAREST), (x * step, y * step))
    buffer = io.BytesIO()
    grid.save(buffer, "PNG")
    _write(path, buffer.getvalue())


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
