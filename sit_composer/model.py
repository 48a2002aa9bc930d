"""ComposerSiT: the network with its objective, as Composer's Trainer takes it."""

import torch
from composer.models import ComposerModel
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from sit_composer.autoencoder import AutoencoderSpec, KLAutoencoder, from_uint8
from sit_composer.sit import SiT, SiTBlock
from sit_composer.transport import Transport

GOLDEN_RATIO = 0.6180339887498949


class ComposerSiT(ComposerModel):
    """A SiT and its transport loss over batches of `data.build_loader`.

    A batch is a dict of ``label`` (N,), ``index`` (N,), and ``moments`` (N, 2C, H, W) or ``image`` (N, C, H, W) uint8.

    Args:
        network: trained; its parameters are the model's, under ``network.``
        transport: the objective.
        autoencoder: what turns moments into latents.
        encoder: encodes pictures in each step, if the data is pixels and the latents are not. It is kept out of
            the module tree, and so out of the optimizer, the shards and the checkpoints.
    """

    def __init__(
        self,
        network: SiT,
        transport: Transport,
        autoencoder: AutoencoderSpec,
        encoder: KLAutoencoder | None = None,
    ):
        super().__init__()
        self.network = network
        self.transport = transport
        self.autoencoder = autoencoder
        self.encoder = encoder  # no nn.Module, so that it stays outside

    def latents(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """The batch's latents, float32 (N, C, H, W), sampled with noise of that shape, or with torch's own."""
        if "moments" in batch:
            moments = batch["moments"].float()
            if noise is None:
                noise = torch.randn_like(moments[:, : self.autoencoder.channels])
            return self.autoencoder.latents(moments, noise)
        pictures = from_uint8(batch["image"])
        return pictures if self.encoder is None else self.encoder.encode(pictures, noise)

    def _losses(self, x1: Tensor, t: Tensor, x0: Tensor, labels: Tensor) -> Tensor:
        # Only the network's matrix products follow autocast: x1, t and x0 are float32, and so is all that is made
        # of them. Its output is made float32 before the target is taken from it.
        xt = self.transport.path.interpolate(t, x0, x1)[0]
        return self.transport.loss(self.network(xt, t, labels).float(), t, x0, x1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The training loss of each sample, at a time and noise drawn for it: (N,)."""
        x1 = self.latents(batch)
        t, x0 = self.transport.draw(x1)
        return self._losses(x1, t, x0, batch["label"])

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The mean over the samples."""
        return outputs.mean()

    def eval_forward(self, batch: dict[str, Tensor], outputs: Tensor | None = None) -> Tensor:
        """The loss of each sample, at a time and noise that are its own: (N,).

        They depend on the sample's index alone, so that evaluations differ by the weights, and not by the batch size
        or the state of training. (Ranks that don't divide the samples see a few twice.) The times are evenly spread
        over the interval (the golden ratio's sequence), as 32 random ones are not.
        """
        index, device = batch["index"], batch["label"].device
        shape = (self.autoencoder.channels, self.network.input_size, self.network.input_size)
        noise = torch.stack([_noise_of(int(i), (2, *shape)) for i in index]).to(device)  # (N, 2, C, H, W)
        t0, t1 = self.transport.interval()
        t = ((index.double() * GOLDEN_RATIO + 0.5) % 1 * (t1 - t0) + t0).float().to(device)
        return self._losses(self.latents(batch, noise[:, 1]), t, noise[:, 0], batch["label"])

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        return {} if is_train else {"loss": MeanMetric()}

    def update_metric(self, batch: dict[str, Tensor], outputs: Tensor, metric: Metric) -> None:
        metric.update(outputs)

    def flops_per_batch(self, batch: dict[str, Tensor]) -> int:
        """FLOPs of a training step on this batch: 2 a multiply-accumulate, and the backward pass twice the forward."""
        return 6 * self.network.forward_macs() * len(batch["label"])

    # Composer asks these of every submodule: a block is the unit of sharding and of activation checkpointing.

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        return isinstance(module, SiTBlock)

    def activation_checkpointing_fn(self, module: nn.Module) -> bool:
        return isinstance(module, SiTBlock)


def _noise_of(index: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(index))
