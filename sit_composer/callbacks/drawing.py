"""Generates images in the middle of training, for the callbacks that show or measure them."""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from sit_composer.algorithms.ema import EMAWeights
from sit_composer.autoencoder import Autoencoder, to_uint8
from sit_composer.choices import Sampling
from sit_composer.generate import generate
from sit_composer.guidance import Guidance
from sit_composer.precision import autocast


@dataclass
class Drawing:
    """Generates images from the averaged weights in the middle of training; each rank generates its share.

    Training's bits stay the same: the noise has its own generators, and the network is in evaluation mode meanwhile.
    All ranks call the network equally often, as sharded weights need.
    """

    labels: list[int]  # of the images, in order
    sampling: Sampling
    autoencoder: Autoencoder  # decodes the images
    weights: EMAWeights | None  # the average; None takes the training weights
    batch_size: int = 64  # images at a time per rank
    before_each: Callable[[], None] = lambda: None  # called before each batch, on all ranks; it may raise

    def __call__(self, state: State, process: Callable[[Tensor], Tensor]) -> Tensor:
        """All images' rows, on every rank; ``process`` makes n rows from n images, uint8 (n, C, H, W)."""
        model = getattr(state.model, "module", state.model)  # inside DDP's wrapper
        rank, ranks, count = dist.get_global_rank(), dist.get_world_size(), len(self.labels)
        share = [min(i, count - 1) for i in range(rank, -(-count // ranks) * ranks, ranks)]  # padded with the last one
        training, parts = model.training, []
        model.eval()
        # FSDP2 gathers weights in the training's precision.
        sharded = any(isinstance(module, FSDPModule) for module in model.modules())
        precision = autocast(model.precision if sharded else "fp32", state.device.name.replace("gpu", "cuda"))
        averaged = self.weights.in_model() if self.weights is not None else nullcontext()
        with torch.no_grad(), averaged, precision:
            guidance = Guidance(model.network, self.sampling.cfg_scale)
            for start in range(0, len(share), self.batch_size):
                self.before_each()
                indices = share[start : start + self.batch_size]
                labels = [self.labels[i] for i in indices]
                latents, _ = generate(guidance, model.transport, labels, indices, self.sampling)
                parts.append(process(to_uint8(self.autoencoder.decode(latents.float()))))
        model.train(training)
        shares = dist.all_gather(torch.cat(parts))  # of rank 0, 1, …
        return torch.stack(list(shares), dim=1).flatten(0, 1)[:count]


class DrawingCallback(Callback):
    """Calls `draw` at each interval (a time string such as ``1000ba``) and at the end of training."""

    def __init__(self, interval: str, drawing: Drawing):
        self.due = create_interval_scheduler(interval)
        self.drawing = drawing

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event in (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT) and self.due(state, event):
            self.draw(state, logger)

    @abstractmethod
    def draw(self, state: State, logger: Logger) -> None:
        """Generates the images and does with them what the callback is for; called on all ranks."""
