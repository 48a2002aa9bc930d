"""Makes repa.safetensors: what the code of REPA and of iREPA gives for tokens and features of ours.

    python -m tests.reference.repa REPA IREPA [--out FOLDER]

The two are checkouts of sihyun-yu/REPA (made with 67f7145) and End2End-Diffusion/iREPA (made with 99ad4ac).
"""

import argparse
import ast
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms import Normalize

from tests.reference.blocks import fill, fill_network

N, GRID, WIDTH, FEATURES = 3, 4, 12, 10


def inputs() -> dict[str, Tensor]:
    """The network's tokens, projected ones, a teacher's features, and images as uint8 levels."""
    features = fill("features", (N, GRID**2, FEATURES)) + fill("mean", (N, 1, FEATURES))
    tokens, projected = fill("tokens", (N, GRID**2, WIDTH)), fill("projected", (N, GRID**2, FEATURES))
    images = ((fill("images", (N, 3, 256, 256)) + 0.2) * 600).to(torch.uint8)
    return {"tokens": tokens, "projected": projected, "features": features, "images": images}


def module(file: Path) -> ModuleType:
    """A file as a module, with the folder's others at hand."""
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(f"theirs_{file.stem}_{len(str(file))}", file)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def preprocess(file: Path) -> Callable[[Tensor, str], Tensor]:
    """`preprocess_raw_image` of a script that imports what isn't here."""
    (function,) = [f for f in ast.parse(file.read_text()).body if getattr(f, "name", "") == "preprocess_raw_image"]
    names = {"torch": torch, "Normalize": Normalize}
    names |= {"IMAGENET_DEFAULT_MEAN": IMAGENET_DEFAULT_MEAN, "IMAGENET_DEFAULT_STD": IMAGENET_DEFAULT_STD}
    exec(compile(ast.Module([function], []), str(file), "exec"), names)
    return names["preprocess_raw_image"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repa", type=Path, help="a checkout of sihyun-yu/REPA")
    parser.add_argument("irepa", type=Path, help="a checkout of End2End-Diffusion/iREPA")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="the folder to write to")
    args = parser.parse_args()
    given, out = inputs(), {}
    # REPA's: its loss computes the network's output, tokens and all, from a noisy image.
    loss = module(args.repa / "loss.py").SILoss()
    _, out["loss"] = loss(lambda x, *_: (x, [given["projected"]]), torch.zeros(N, 1, 2, 2), zs=[given["features"]])
    mlp = module(args.repa / "models" / "sit.py").build_mlp(WIDTH, 2048, FEATURES)
    fill_network(mlp)
    out["mlp"] = mlp(given["tokens"].flatten(0, 1)).unflatten(0, (N, -1))
    out["preprocessed"] = preprocess(args.repa / "train.py")(given["images"].float(), "dinov2")[:, :, ::16, ::16]
    # iREPA's.
    zscore = module(args.irepa / "jit" / "spnorm.py").spatial_zscore
    out |= {f"spatial_norm {gamma}": zscore(given["features"], gamma) for gamma in (0.6, 1.0)}
    conv = module(args.irepa / "jit" / "projectors.py").ProjectionLayer(
        "conv", hidden_size=WIDTH, z_dim=FEATURES, proj_kwargs_kernel_size=3
    )
    fill_network(conv.projection_layer)
    out["conv"] = conv(given["tokens"])
    cosine = module(args.irepa / "ldm" / "projection_loss.py").CosineProjectionLoss()
    out["irepa loss"] = cosine(out["spatial_norm 0.6"], given["projected"])
    save_file({name: value.detach().float().contiguous() for name, value in out.items()}, args.out / "repa.safetensors")


if __name__ == "__main__":
    main()
