"""What a run adds to Composer's callbacks: a record of what is trained, and the quality of its samples."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from composer.core import State
from composer.core.precision import get_precision_context
from composer.utils import dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from sit_composer.algorithms.ema import EMAWeights
from sit_composer.autoencoder import Autoencoder, to_uint8
from sit_composer.choices import Sampling
from sit_composer.generate import generate
from sit_composer.guidance import Guidance


class Drawing:
    """Draws pictures from the averaged weights in the middle of training, each rank its share of them.

    Their noise comes from generators of their own, and the network is in evaluation mode meanwhile: training's bits
    are the same with it and without. All ranks call the network equally often, as sharded weights need.

    Args:
        labels: of the pictures, in order.
        sampling: how they are drawn.
        autoencoder: decodes them.
        weights: the average; None draws from the training weights.
        batch_size: pictures at a time on a rank.
        before_each: called before each such batch, on all ranks; it may raise.
    """

    def __init__(
        self,
        labels: list[int],
        sampling: Sampling,
        autoencoder: Autoencoder,
        weights: EMAWeights | None,
        batch_size: int = 64,
        before_each: Callable[[], None] = lambda: None,
    ):
        self.labels = labels
        self.sampling = sampling
        self.autoencoder = autoencoder
        self.weights = weights
        self.batch_size = batch_size
        self.before_each = before_each

    def __call__(self, state: State, process: Callable[[Tensor], Tensor]) -> Tensor:
        """What process makes of the pictures, uint8 (n, C, H, W), put together: a row a picture, on every rank."""
        model = state.model.module if hasattr(state.model, "module") else state.model  # DDP's wrapper
        rank, ranks, count = dist.get_global_rank(), dist.get_world_size(), len(self.labels)
        share = [min(i, count - 1) for i in range(rank, -(-count // ranks) * ranks, ranks)]  # the last one to fill up
        training = model.training
        model.eval()
        parts = []
        # FSDP2 gathers weights in the precision of training, autocast's, and callbacks are called without autocast.
        sharded = any(isinstance(module, FSDPModule) for module in model.modules())
        precision = get_precision_context(state.precision) if sharded else nullcontext()
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
