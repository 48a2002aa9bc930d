"""Makes blocks.safetensors and blocks.json: what the code of LightningDiT and of RiT gives for networks of ours.

    python -m tests.reference.blocks LIGHTNINGDIT RIT [--out FOLDER] [--weights]

The two are checkouts of hustvl/LightningDiT and lezhang7/RiT; timm and einops must be installed. Weights and inputs are
those of `fill`, so that only outputs are kept. The gradients are those of the sum of output · input, by their norms.
"""

import argparse
import json
import re
import sys
import types
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

SIZES = {"input_size": 4, "patch_size": 1, "in_channels": 3, "hidden_size": 32, "depth": 3, "num_heads": 2,
         "num_classes": 5}  # fmt: skip
CASES = {  # ours -> theirs; with SIZES, mlp_ratio 4 and no learn_sigma
    "LightningDiT": (
        {"rms_norm": True, "swiglu": True, "rotary": True},
        {"use_rmsnorm": True, "use_swiglu": True, "use_rope": True},
    ),
    "LightningDiT, QK-norm": (
        {"rms_norm": True, "swiglu": True, "rotary": True, "qk_norm": True},
        {"use_rmsnorm": True, "use_swiglu": True, "use_rope": True, "use_qknorm": True},
    ),
    "QK-norm alone": ({"qk_norm": True}, {"use_qknorm": True}),
    "RiT": (
        {"rms_norm": True, "swiglu": True, "rotary": True, "qk_norm": True, "class_tokens": 5, "class_tokens_start": 1},
        {"in_context_len": 5, "in_context_start": 1},
    ),
}


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    """Values in (-0.2, 0.2) that are the same everywhere; about 1 for the gain of a norm."""
    count = torch.Size(shape).numel()
    mixed = (torch.arange(1, count + 1) * 2654435761 + zlib.crc32(name.encode())) % 2**32
    values = (0.4 * (mixed.double() / 2**32 - 0.5)).float().reshape(shape)
    return values + 1 if re.search(r"norm\w*\.weight$", name) else values


def fill_network(network: nn.Module) -> None:
    """Fills the trained parameters; positions stay."""
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(fill(name, parameter.shape))


def inputs() -> dict[str, Tensor]:
    """x (2, 3, 4, 4), t and labels, one of which is the null class."""
    shape = 2, SIZES["in_channels"], SIZES["input_size"], SIZES["input_size"]
    return {"x": 5 * fill("x", shape), "t": torch.tensor([0.2, 0.7]), "y": torch.tensor([3, 5])}


def results(network: nn.Module) -> dict[str, Tensor]:
    """The output, and the norms of the trained parameters' gradients by the order of their names."""
    given = inputs()
    out = network.eval()(**given)
    out.mul(given["x"]).sum().backward()
    trained = sorted((name, p) for name, p in network.named_parameters() if p.requires_grad)
    return {"out": out.detach().contiguous(), "grad_norms": torch.stack([p.grad.norm() for _, p in trained])}


def released_shapes(network: nn.Module) -> dict[str, list[int]]:
    """The shape of each tensor of a state dict, of those of the blocks once."""
    return {re.sub(r"^blocks\.\d+", "blocks.*", name): list(t.shape) for name, t in network.state_dict().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lightningdit", type=Path, help="a checkout of hustvl/LightningDiT")
    parser.add_argument("rit", type=Path, help="a checkout of lezhang7/RiT")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="the folder to write to")
    parser.add_argument("--weights", action="store_true", help="write a .pt of each LightningDiT too, as its train.py")
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    layers = ("ColumnParallelLinear", "ParallelEmbedding", "RowParallelLinear")
    for module, names in {"initialize": (), "layers": layers}.items():
        # Their rmsnorm.py imports these, and uses none.
        stub = types.ModuleType(f"fairscale.nn.model_parallel.{module}")
        vars(stub).update(dict.fromkeys(names))
        sys.modules[stub.__name__] = stub
    for name in ("fairscale", "fairscale.nn", "fairscale.nn.model_parallel"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["fairscale.nn.model_parallel"].initialize = sys.modules["fairscale.nn.model_parallel.initialize"]
    torch.Tensor.cuda = lambda self: self  # RiT puts its tables on a GPU
    torch.compiler.set_stance("force_eager")  # their methods are compiled ones
    sys.path[:0] = [str(args.lightningdit), str(args.rit)]
    from model import RiT
    from models.lightningdit import LightningDiT, LightningDiT_models

    tensors = {}
    for case, (_, theirs) in CASES.items():
        network = (RiT if case == "RiT" else LightningDiT)(**SIZES, **theirs)
        fill_network(network)
        tensors |= {f"{case}/{name}": value for name, value in results(network).items()}
        if args.weights and case != "RiT":
            weights = network.state_dict()
            torch.save({"model": weights, "ema": weights, "config": {}}, args.out / f"{case}.pt")
        if case == "LightningDiT":
            tensors |= {name: value.clone() for name, value in network.state_dict().items() if "feat_rope" in name}
    released = {**CASES["LightningDiT"][1], "input_size": 16, "in_channels": 32}
    shapes = {}
    with torch.device("meta"):
        for name in ("LightningDiT-B/1", "LightningDiT-XL/1"):
            LightningDiT.initialize_weights = lambda self: None
            network = LightningDiT_models[name](**released)
            shapes[name] = {"depth": len(network.blocks), **released_shapes(network)}
    save_file(tensors, args.out / "blocks.safetensors")
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(found)}" for name, found in shapes.items())
    (args.out / "blocks.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
