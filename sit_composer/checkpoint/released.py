"""The authors' ``.pt``, as released or as their ``train.py`` writes it."""

import argparse
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from sit_composer.autoencoder import AutoencoderSpec
from sit_composer.checkpoint.record import Checkpoint, NoSuchWeights, _check_fit, _check_record
from sit_composer.checkpoint.safe_load import CheckpointError
from sit_composer.choices import SIZES


def _are_weights(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("x_embedder.proj.weight"), Tensor)


def _from_authors(file: Path, content: dict[str, Any], which: str) -> Checkpoint:
    """A bare state dict, which is the average, or a dict of model, ema, opt and args.

    A bare one doesn't tell its path and prediction: they are taken for the released ones', Linear and velocity.
    """
    held = {"ema": content} if _are_weights(content) else {"training": content.get("model"), "ema": content.get("ema")}
    weights = held.get(which)
    if not _are_weights(weights):
        other = next(name for name in held if name != which)
        raise NoSuchWeights(f"{file}: no {which} weights, only the {other} ones; ask for those")
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else {}
    model = _network_of(file, weights, args)
    _check_fit(file, model, weights)
    if model["in_channels"] != 4:
        raise CheckpointError(
            f"{file}: of {model['in_channels']} channels, where the authors' autoencoder has 4; if sit_composer "
            "exported it, give the exported folder"
        )
    names = ("path_type", "prediction", "loss_weight", "train_eps", "sample_eps")
    transport = {"path_type": "Linear", "prediction": "velocity", "loss_weight": None, "train_eps": None}
    transport = {**transport, "sample_eps": None, **{name: args[name] for name in names if name in args}}
    if transport["prediction"] == "velocity" and transport["path_type"] != "VP":
        transport |= {"train_eps": None, "sample_eps": None}  # their code takes 0 then, whatever the arguments are
    autoencoder = f"stabilityai/sd-vae-ft-{args.get('vae', 'ema')}"
    record = {
        "model": model,
        "transport": transport,
        "autoencoder": AutoencoderSpec(autoencoder, channels=4, downsample=8, scale=0.18215).as_dict(),
        "classes": [str(label) for label in range(model["num_classes"])],
        "cfg_channels": 3,  # how their sampling guides
        "ema_decay": 0.9999,  # train.py's, which it has no option for
    }
    _check_record(file, record)
    try:  # AdamW counts its steps for each parameter
        step = int(next(iter(content["opt"]["state"].values()))["step"])
    except (KeyError, TypeError, StopIteration):
        step = 0
    return Checkpoint(dict(weights), which, record, step, str(file))


def _network_of(file: Path, weights: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the `SiT` that such weights fit, from their shapes.

    Shapes don't tell two things. The heads come from the table of sizes (or ``args.num_heads``, which forks have); and
    the label table's last row is taken for the null class, which the authors' code always has, unless
    ``args.num_classes`` says otherwise.
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
            "mlp_ratio": len(weights["blocks.0.mlp.fc1.weight"]) / hidden,
            "num_classes": num_classes,
            "class_dropout_prob": 0.1 if rows > num_classes else 0.0,
            "learn_sigma": len(weights["final_layer.linear.weight"]) == 2 * channels * patch * patch,
        }
    except KeyError as error:
        raise CheckpointError(f"{file}: not the weights of a SiT: {error} is missing") from None
    except (ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f"{file}: not the weights of a SiT: {error}") from None
    heads = {hidden_size: num_heads for hidden_size, _, num_heads in SIZES.values()}
    num_heads = args.get("num_heads", heads.get(hidden))
    if num_heads is None:
        raise CheckpointError(
            f"{file}: the number of attention heads can't be told: the width is {hidden}, and the known sizes have "
            f"{', '.join(map(str, heads))}; add it to the file's args as num_heads"
        )
    return {**shapes, "num_heads": num_heads}
