"""The authors' ``.pt``, as released or as their ``train.py`` writes it, and such weights as others save them."""

import argparse
import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from sit_composer.checkpoint.record import Checkpoint, NoSuchWeights, Record, check_fit
from sit_composer.checkpoint.safe_load import CheckpointError
from sit_composer.choices import SIZES
from sit_composer.data.spec import DataSpec

# In front of any part of a name: DDP's, torch.compile's, FSDP's and activation checkpointing's.
WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
OPTIONS = {  # of `SiT`, and a tensor that only a network with it has
    "qk_norm": "blocks.0.attn.q_norm.weight", "rms_norm": "blocks.0.norm1.weight",
    "swiglu": "blocks.0.mlp.w12.weight", "rotary": "feat_rope.freqs_cos",
}  # fmt: skip
NAMES = {"training": ("model", "model_state_dict"), "ema": ("ema", "ema_state_dict", "model_ema", "state_dict_ema")}


def weights_in(content: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a SiT in a file, as "training" or "ema"; those that stand alone are the average."""
    named = {name: weights for name in content if (weights := _unwrapped(content[name]))}
    found = {kind: named[name] for kind, names in NAMES.items() for name in names if name in named}
    others = [named[name] for name in named if name not in (*NAMES["training"], *NAMES["ema"])]
    if alone := _unwrapped(content) or named.get("state_dict") or (others[0] if len(others) == 1 else None):
        found.setdefault("training" if "ema" in found else "ema", alone)
    return found


def _unwrapped(content: Any) -> dict[str, Tensor] | None:
    """A SiT's state dict under the published names; None if it is none, or has a name with and without a prefix."""
    if not isinstance(content, dict):
        return None
    weights = {WRAPPERS.sub("", str(name)): value for name, value in content.items()}
    weights.pop("n_averaged", None)  # torch's AveragedModel counts
    first = "x_embedder.proj.weight"
    # Another name of the network, as Lightning's model.
    prefix = next((name.removesuffix(first) for name in weights if name.endswith(f".{first}")), "")
    weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    is_one = isinstance(weights.get(first), Tensor) and len(weights) + ("n_averaged" in content) == len(content)
    return weights if is_one else None


def from_authors(
    file: Path, content: dict[str, Any], held: dict[str, dict[str, Tensor]], which: str, latents: DataSpec | None = None
) -> Checkpoint:
    """The weights of that name of those that the file holds, a bare state dict or a dict of model, ema, opt and args.

    A bare one is assumed to have the path and the prediction of the released ones, Linear and velocity. The latents are
    those of the authors' autoencoder, or of such shards as are described.
    """
    weights = held.get(which)
    if weights is None:
        raise NoSuchWeights(f"{file}: no {which} weights, only the {' and '.join(held)} ones; ask for those")
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else {}
    model = _network_of(file, weights, args)
    check_fit(file, model, weights)
    transport = {"path_type": args.get("path_type", "Linear"), "prediction": args.get("prediction", "velocity")}
    transport |= {name: args.get(name) for name in ("loss_weight", "train_eps", "sample_eps")}
    if transport["prediction"] == "velocity" and transport["path_type"] != "VP":
        transport |= {"train_eps": None, "sample_eps": None}  # their code uses 0 then, whatever the arguments
    record = {
        "model": model,
        "transport": transport,
        **_latents_of(file, model, args, latents),
        "cfg_channels": 3,  # as their sampling guides
        "ema_decay": 0.9999,  # fixed in their train.py
    }
    try:  # AdamW counts its steps for each parameter
        step = int(next(iter(content["opt"]["state"].values()))["step"])
    except (KeyError, TypeError, StopIteration):
        step = 0
    return Checkpoint(weights, which, Record.from_dict(record, file), step, str(file))


def _latents_of(file: Path, model: dict[str, Any], args: dict[str, Any], latents: DataSpec | None) -> dict[str, Any]:
    """The record's autoencoder and classes: those of the spec, which has to fit, or the authors'."""
    channels = 4 if latents is None else latents.channels
    if model["in_channels"] != channels:
        whose = "the authors' autoencoder" if latents is None else "the spec's latents"
        what = f"got {model['in_channels']} channels, expected the {channels} of {whose}"
        advice = "give the spec.json of shards of its latents to sit_composer.export --spec, or the exported folder"
        raise CheckpointError(f"{file}: {what}; {advice}")
    if latents is None:
        name = f"stabilityai/sd-vae-ft-{args.get('vae', 'ema')}"
        autoencoder = {"name": name, "channels": 4, "downsample": 8, "scale": 0.18215}
        return {"autoencoder": autoencoder, "classes": [str(label) for label in range(model["num_classes"])]}
    if (side := model["input_size"] * latents.autoencoder["downsample"]) != latents.image_size:
        what = f"expected {side}, as these weights are for latents of {model['input_size']}²"
        raise CheckpointError(f"{file}: the spec has images of {latents.image_size}, {what}")
    return {"autoencoder": latents.autoencoder, "classes": latents.classes}


def _network_of(file: Path, weights: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the `SiT` that such weights fit, from their shapes, which don't say two things.

    The heads come from the table of sizes (or ``args.num_heads``, which forks have). The label table's last row is
    assumed to be the null class, as in the authors' code, unless ``args.num_classes`` says otherwise.
    """
    try:
        hidden, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        rows = len(weights["y_embedder.embedding_table.weight"])
        num_classes = args.get("num_classes", rows - 1)
        shapes = {
            "input_size": math.isqrt(weights["pos_embed"].shape[1]) * patch,
            "patch_size": patch,
            "in_channels": channels,
            "hidden_size": hidden,
            "depth": depth,
            "mlp_ratio": _mlp_ratio(weights, hidden),
            "num_classes": num_classes,
            "class_dropout_prob": 0.1 if rows > num_classes else 0.0,
            "learn_sigma": len(weights["final_layer.linear.weight"]) == 2 * channels * patch * patch,
        }
    except (KeyError, ValueError, IndexError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{file}: not the weights of a SiT: {reason}") from None
    found = {option: True for option, name in OPTIONS.items() if name in weights}
    heads = {hidden_size: num_heads for hidden_size, _, num_heads in SIZES.values()}
    num_heads = args.get("num_heads", heads.get(hidden))
    if num_heads is None:
        what = f"got width {hidden}, expected one of {', '.join(map(str, heads))}; add num_heads to the file's args"
        raise CheckpointError(f"{file}: the number of attention heads is unknown: {what}")
    return {**shapes, "num_heads": num_heads, **found}


def _mlp_ratio(weights: dict[str, Tensor], hidden: int) -> float:
    if "blocks.0.mlp.w12.weight" not in weights:
        return len(weights["blocks.0.mlp.fc1.weight"]) / hidden
    inner = weights["blocks.0.mlp.w3.weight"].shape[1]  # 2 / 3 · hidden · ratio, rounded down twice
    ratio = round(1.5 * inner / hidden, 2)
    return ratio if 2 * int(hidden * ratio) // 3 == inner else (-(-3 * inner // 2) + 0.5) / hidden
