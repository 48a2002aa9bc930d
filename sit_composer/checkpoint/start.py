"""A new run's weights from a checkpoint's, for other classes or another resolution; everything else must be the same.

Positions at another resolution keep their place in the image: token i of N stands where i · M / N stood of M, between
its neighbours, at which the network's sin-cos table and rotations are computed anew (the "positional embedding
interpolation" of PixArt-α, arXiv 2310.00426, and of rotations in EVA-02, arXiv 2303.11331). So the network meets no
position that it hasn't learned, and a patch's neighbours stay where they are in the image. Only a table that is none of
sin-cos, such as a fork's learned one, is interpolated bicubically.
"""

import inspect
import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sit_composer.checkpoint.record import Checkpoint, Record
from sit_composer.checkpoint.safe_load import CheckpointError
from sit_composer.data.imagenet import known_as
from sit_composer.embedders import Rotations, sincos_positions
from sit_composer.sit import SiT

ADAPTED = ("input_size", "num_classes", "class_dropout_prob", "learn_sigma")  # arguments of `SiT` that may differ
WHY = {  # an argument may not, besides shapes that differ
    "patch_size": "; the maps of one size of patches don't fit another",
    "in_channels": "; the maps of one number of channels don't fit another",
}
TABLE, POSITIONS = "y_embedder.embedding_table.weight", "pos_embed"
TOLERANCE = 1e-3  # of sinusoids, which others computed


def label_rows(theirs: list[str], ours: list[str]) -> list[int | None]:
    """For each of our classes the label of theirs with the same name; None for a new class.

    A class of ImageNet is the same under its name, its WordNet id, and its label in the authors' released weights.
    """
    exact = {name: label for label, name in enumerate(theirs)}
    known = {name: label for label, name in enumerate(known_as(theirs))}
    return [exact.get(name, known.get(id_)) for name, id_ in zip(ours, known_as(ours), strict=True)]


def compare(theirs: Record, ours: Record, where: str) -> dict[str, str]:
    """What becomes of the weights of a network, read from ``where``, in another one: lines by their names.

    Raises CheckpointError, naming the key, for a difference with which they have no use.
    """
    for name in inspect.signature(SiT).parameters:
        got, expected = ours.argument(name), theirs.argument(name)
        if name not in ADAPTED and got != expected:
            raise CheckpointError(f"model.{name}: got {got}, expected {expected} as in {where}{WHY.get(name, '')}")
    for name in ("path_type", "prediction"):
        got, expected = getattr(ours.build_transport(), name), getattr(theirs.build_transport(), name)
        if got != expected:
            raise CheckpointError(f"transport.{name}: got {got}, expected {expected}, which {where} was trained for")
    lines = {"classes": _classes(theirs, ours)}
    old, new = grid_of(theirs), grid_of(ours)
    if old != new:
        lines["positions"] = f"{old}x{old} tokens become {new}x{new}, interpolated between the positions of before"
    if theirs.argument("learn_sigma") != ours.argument("learn_sigma"):
        lost = "left out" if theirs.argument("learn_sigma") else "new, and never trained"
        lines["output"] = f"the half of its channels that learn_sigma adds is {lost}"
    if ours.autoencoder is not None and theirs.autoencoder != ours.autoencoder:  # None: not known yet
        lines["latents"] = f"warning: of {ours.autoencoder}, but {where} was trained on those of {theirs.autoencoder}"
    return lines


def _classes(theirs: Record, ours: Record) -> str:
    rows = label_rows(theirs.classes, ours.classes)
    new = [name for name, row in zip(ours.classes, rows, strict=True) if row is None]
    text = f"{len(rows) - len(new)} of {len(rows)} keep their rows, by name"
    if len(theirs.classes) > len(ours.classes) and all(name.isdecimal() for name in (*theirs.classes, *ours.classes)):
        text = f"warning: {text}, which are numbers in both; give the classes names if they mean others"
    if new:
        text += f"; new: {', '.join(new[:50])}{', …' if len(new) > 50 else ''}"
        if len(new) == len(rows):
            text += f" (the checkpoint has {', '.join(theirs.classes[:5])}{', …' if len(theirs.classes) > 5 else ''})"
    kept = {(True, True): "kept", (False, True): "new", (True, False): "left out"}
    null = kept.get((theirs.has_null_class, ours.has_null_class))
    return text + (f"; the null class is {null}" if null else "")


def grid_of(record: Record) -> int:
    """A network's tokens along a side."""
    return record.argument("input_size") // record.argument("patch_size")


@torch.no_grad()
def transfer(checkpoint: Checkpoint, ours: Record, network: SiT) -> None:
    """Fills a network, whose record ``ours`` is, with the weights of a checkpoint that `compare` admits.

    Rows of new classes stay as the network has them.
    """
    theirs, weights, own = checkpoint.record, dict(checkpoint.weights), network.state_dict()
    rows = own[TABLE].clone()
    for label, row in enumerate(label_rows(theirs.classes, ours.classes)):
        if row is not None:
            rows[label] = weights[TABLE][row]
    if theirs.has_null_class and ours.has_null_class:
        rows[-1] = weights[TABLE][-1]
    weights[TABLE] = rows
    if grid_of(theirs) != grid_of(ours):
        weights |= _positions(weights, network, grid_of(theirs), grid_of(ours), checkpoint.path)
    if theirs.argument("learn_sigma") != ours.argument("learn_sigma"):
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):  # (p²·C, …), the channel runs fastest
            patch = network.patch_size**2
            new, old = own[name].clone().unflatten(0, (patch, -1)), weights[name].unflatten(0, (patch, -1))
            new[:, : network.in_channels] = old[:, : network.in_channels]
            weights[name] = new.flatten(0, 1)
    network.load_state_dict(weights)


def _positions(weights: dict[str, Tensor], network: SiT, old: int, new: int, where: str) -> dict[str, Tensor]:
    """The table of positions, and the rotations if there are any, of new x new tokens, from those of old x old."""
    table = weights[POSITIONS].float()  # (1, old², D)
    width = table.shape[-1]
    spacing = _spacing(table[0, 1, 0], table[0, 1, width // 4]) if old > 1 else 1.0
    if torch.allclose(table, sincos_positions(width, old, spacing), atol=TOLERANCE):
        found = {POSITIONS: sincos_positions(width, new, spacing * old / new)}
    else:
        maps = table.unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, D, old, old)
        found = {POSITIONS: interpolate(maps, size=(new, new), mode="bicubic").flatten(2).mT}
    if network.feat_rope is not None:
        cos, sin = weights["feat_rope.freqs_cos"].float(), weights["feat_rope.freqs_sin"].float()  # (old², head width)
        head = cos.shape[-1]
        spacing = _spacing(sin[1, head // 2], cos[1, head // 2]) if old > 1 else 1.0
        if not torch.allclose(cos, Rotations(head, old, spacing).freqs_cos, atol=TOLERANCE):
            raise CheckpointError(f"model.input_size: {where} has rotations of positions that no SiT has")
        found |= {f"feat_rope.{n}": value for n, value in Rotations(head, new, spacing * old / new).named_buffers()}
    return found


def _spacing(sine: Tensor, cosine: Tensor) -> float:
    """The distance of two tokens, by the second one's sinusoids: 1 unless the resolution was changed before."""
    return round(math.atan2(sine, cosine), 6)
