"""What a network is, which training writes into every checkpoint; and a checkpoint's weights with it."""

import hashlib
import inspect
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sit_composer.autoencoder import SLICE_SIZE, Autoencoder, AutoencoderSpec, load_autoencoder
from sit_composer.averages import std_of
from sit_composer.checkpoint.safe_load import CheckpointError
from sit_composer.choices import AVERAGE
from sit_composer.errors import UserError, check_version
from sit_composer.sit import SiT
from sit_composer.transport import Transport

CONFIG = "config.json"  # an exported folder's record
VERSION = 1  # of checkpoints and exported folders
FORMAT = {"format": "sit_composer", "version": VERSION}  # of CONFIG
EXPORTED = {"training": "model.safetensors", "ema": "ema.safetensors"}
EXPORTED_FILE = re.compile(rf"model\.safetensors|ema(-{AVERAGE.pattern})?\.safetensors")  # more averages by their names
REFUSALS = (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError)  # of constructors, for wrong arguments


class NoSuchWeights(CheckpointError):
    """The checkpoint is sound, but has no weights of that name."""


@dataclass(frozen=True)
class Record:
    """What a network is: everything that is needed to use its weights."""

    model: dict[str, Any]  # SiT's arguments
    transport: dict[str, Any]  # Transport's arguments
    autoencoder: AutoencoderSpec
    classes: list[str]  # a name for each label
    ema_decay: float | None = None  # of the first average; None without one, or if it is a power function's
    cfg_channels: int | None = None  # channels that sampling guides by default; None: all
    averages: list[str] | None = None  # the names of all averages; None: one with ema_decay, or none

    @classmethod
    def from_dict(cls, content: dict[str, Any], where: str | Path) -> "Record":
        """The record that `as_dict` gave, read from ``where``; raises CheckpointError for a part that is wrong.

        Raises UserError if a newer version wrote it.
        """
        check_version(content.get("version"), VERSION, str(where))
        for name, make in (("model", on_meta), ("transport", Transport), ("autoencoder", AutoencoderSpec)):
            try:
                make(**content[name])
            except REFUSALS as error:
                reason = f"{error} is missing" if isinstance(error, KeyError) else error
                raise CheckpointError(f"{where}: {name}: {reason}") from None
        rest: dict[str, Any] = {n: content.get(n) for n in ("classes", "ema_decay", "cfg_channels", "averages")}
        record = cls(content["model"], content["transport"], AutoencoderSpec(**content["autoencoder"]), **rest)
        count = record.argument("num_classes")
        if not isinstance(record.classes, list) or len(record.classes) != count:
            raise CheckpointError(f"{where}: classes: expected {count} names, one per class of the model")
        held = record.averages
        named = isinstance(held, list) and all(isinstance(name, str) and AVERAGE.fullmatch(name) for name in held)
        if held is not None and not (held and named):
            raise CheckpointError(f"{where}: averages: got {held}, expected names such as 0.999 or power0.05")
        return record

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON holds it."""
        guided = {} if self.cfg_channels is None else {"cfg_channels": self.cfg_channels}
        several = {} if self.averages is None else {"averages": self.averages}
        return {**self.settings(), "classes": self.classes, **guided, "ema_decay": self.ema_decay, **several}

    def name_of(self, weights: str, where: str | Path) -> str:
        """The name of weights as results hold it: "ema" stands for the first of several averages, as ema:NAME.

        Raises NoSuchWeights, with the names of those in the checkpoint ``where``, for an average that it lacks.
        """
        kind, _, name = weights.partition(":")
        held = self.averages or ([] if self.ema_decay is None else [str(self.ema_decay)])
        if name and name not in held:
            there = ", ".join([*(f"ema:{one}" for one in held), "training"])
            raise NoSuchWeights(f"{where}: no average {name}, expected one of its weights, {there}")
        return kind if kind == "training" or self.averages is None else f"ema:{name or held[0]}"

    def with_only(self, weights: str) -> "Record":
        """The record of a folder that has no others than these weights."""
        name = weights.partition(":")[2]
        if weights == "training":
            return replace(self, averages=None, ema_decay=None)
        if not name:
            return self
        return replace(self, averages=[name], ema_decay=float(name) if std_of(name) is None else None)

    def settings(self) -> dict[str, Any]:
        """The parts that results hold."""
        return {"model": self.model, "transport": self.transport, "autoencoder": self.autoencoder.as_dict()}

    def argument(self, name: str) -> Any:
        """An argument of the network, or its default."""
        return self.model.get(name, inspect.signature(SiT).parameters[name].default)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network works on."""
        side = self.argument("input_size")
        return self.argument("in_channels"), side, side

    @property
    def image_size(self) -> int:
        """The side of the images, in pixels."""
        return self.argument("input_size") * self.autoencoder.downsample

    @property
    def has_null_class(self) -> bool:
        """Whether the network was trained with label dropout, so that it can be guided."""
        return self.argument("class_dropout_prob") > 0

    def build_network(self) -> SiT:
        """The network, with initial weights."""
        return SiT(**self.model)

    def build_transport(self) -> Transport:
        return Transport(**self.transport)


@dataclass(frozen=True)
class Checkpoint:
    """Weights with the published names, and what they are."""

    weights: dict[str, Tensor]  # on the CPU
    which: str  # "ema" or "training"; of several averages "ema:NAME"
    record: Record
    step: int  # batches trained; 0 if the file doesn't say, as the released ones
    path: str  # the file that the weights come from
    epoch: int = 0  # whole epochs trained; 0 if the file doesn't say
    samples: int = 0  # samples trained on; 0 if the file doesn't say
    source: str = ""  # where the user has it: the path, or the URI that it was downloaded from

    def build_network(self, device: torch.device | str = "cpu") -> SiT:
        """The network with these weights, for evaluation."""
        network = self.record.build_network()
        network.load_state_dict(self.weights)
        return network.to(device).eval().requires_grad_(False)

    def load_autoencoder(
        self, device: torch.device | str, dtype: torch.dtype = torch.float32, slice_size: int = SLICE_SIZE
    ) -> Autoencoder:
        """The autoencoder of the network's latents; raises UserError if the one of that name is another now."""
        known = self.record.autoencoder
        autoencoder = load_autoencoder(known.name, known.channels, device, dtype, slice_size, known)
        if autoencoder.spec != known:
            now = f"but the autoencoder of that name is now {autoencoder.spec}"
            raise UserError(f"{self.source}: trained on latents of {known}, {now}")
        return autoencoder

    def describe(self) -> dict[str, Any]:
        """What identifies the weights, as results record it."""
        return {"path": self.source, "step": self.step, "sha256": digest(self.path), "weights": self.which}


def digest(place: str | Path) -> str:
    """The sha256 of a checkpoint's file; of a sharded one's folder, that of its files' names and sha256s."""
    if not Path(place).is_dir():
        with open(place, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    lines = [f"{file.name} {digest(file)}\n" for file in sorted(Path(place).iterdir())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_fit(file: Path, model: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Raises CheckpointError, naming a tensor, unless the weights are exactly the network's, in their shapes."""
    try:
        expected = {name: tuple(tensor.shape) for name, tensor in on_meta(**model).state_dict().items()}
    except REFUSALS as error:
        raise CheckpointError(f"{file}: not the weights of a SiT: {error}") from None
    for name in (name for name in [*weights, *expected] if name not in weights or name not in expected):
        wrong = f"it has {name}, which a SiT has not" if name in weights else f"{name} is missing"
        raise CheckpointError(f"{file}: not the weights of a SiT: {wrong}")
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(f"{file}: {name}: got shape {tuple(weights[name].shape)}, expected {shape}")


def on_meta(**model: Any) -> SiT:
    """The network without memory for its weights."""
    with torch.device("meta"), Uninitialized():
        return Skeleton(**model)


class Skeleton(SiT):
    """A SiT whose weights are not initialized."""

    def initialize_weights(self) -> None:
        pass


class Uninitialized(TorchFunctionMode):
    """Draws no random weights: on the meta device, torch loads its compiler for that, which takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in ("uniform_", "kaiming_uniform_", "normal_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
