"""ComposerSiT: the network with its objective, as Composer's Trainer takes it."""

from composer.models import ComposerModel
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from sit_composer import randomness
from sit_composer.algorithms.alignment import Alignment, Noised
from sit_composer.algorithms.projector import tokens_after
from sit_composer.autoencoder import AutoencoderSpec, DiffusersAutoencoder, from_uint8
from sit_composer.costs.flops import sample_flops
from sit_composer.precision import autocast
from sit_composer.sit import SiT, SiTBlock
from sit_composer.transport import Transport

GOLDEN_RATIO = 0.6180339887498949


class ComposerSiT(ComposerModel):
    """A SiT and its transport loss over batches of `data.loader.build_loader`.

    A batch is a dict of ``label``, ``index`` and ``key`` (each int64 (N,)), and of ``moments`` (N, 2C or C, H, W) or
    ``image`` (N, C, H, W) uint8. The autoencoder turns moments into latents; the encoder, if there is one, encodes
    images in each step. It is kept out of the module tree, and so out of the optimizer, shards and checkpoints.
    The network, and nothing else, computes in ``precision``; see `precision.autocast`. An alignment's projector
    counts as network there; it is trained and checkpointed with the network, and is not a part of exports.
    """

    def __init__(
        self,
        network: SiT,
        transport: Transport,
        autoencoder: AutoencoderSpec,
        encoder: DiffusersAutoencoder | None = None,
        precision: str = "fp32",
        alignment: Alignment | None = None,
    ):
        super().__init__()
        self.network = network
        self.transport = transport
        self.autoencoder = autoencoder
        self.encoder = encoder  # DiffusersAutoencoder is no nn.Module
        self.precision = precision  # of the network alone: fp32, bf16 or amp_bf16
        # DDP reads this, and would send the rotations, which are constants, from rank 0 before each forward pass.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self.alignment = alignment
        self.projector = alignment.projector if alignment is not None else None
        # Composer asks the network for these: a block is the unit of sharding and of activation checkpointing.
        network.fsdp_wrap_fn = network.activation_checkpointing_fn = lambda module: isinstance(module, SiTBlock)

    def latents(self, batch: dict[str, Tensor], keys: Tensor) -> Tensor:
        """The batch's latents, float32 (N, C, H, W); their random part is drawn by the keys (N,)."""
        if "moments" in batch:
            return self.autoencoder.latents(batch["moments"].float(), self._posterior_noise(keys))
        images = from_uint8(batch["image"])
        return images if self.encoder is None else self.encoder.encode(images, self._posterior_noise(keys))

    def _posterior_noise(self, keys: Tensor) -> Tensor | None:
        return None if self.autoencoder.deterministic else self._normal(keys, randomness.POSTERIOR)

    def _normal(self, keys: Tensor, purpose: int) -> Tensor:
        side = self.network.input_size
        return randomness.normal(keys, purpose, (self.autoencoder.channels, side, side))  # (N, C, H, W)

    def field(self, x: Tensor, t: Tensor, y: Tensor, draws: Tensor | None = None) -> Tensor:
        """The network's output in the model's precision, see `SiT.forward`."""
        with autocast(self.precision, x.device.type):
            return self.network(x, t, y, draws)

    def _noised(self, batch: dict[str, Tensor], t: Tensor, keys: Tensor) -> Noised:
        # All float32.
        x1, x0 = self.latents(batch, keys), self._normal(keys, randomness.X0)  # (N, C, H, W)
        return Noised(t, x0, x1, randomness.uniform(keys, randomness.DROP))

    def _losses(self, noised: Noised, y: Tensor) -> Tensor:
        t, x0, x1, draws = noised
        return self.transport.loss_at(self.field, t, x0, x1, y=y, draws=draws)  # float32 too

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss per sample: (N,). A sample's key determines its noise, time and label dropout: see `randomness`.

        An alignment gets its distances, (N,), and adds them itself.
        """
        keys, alignment = batch["key"], self.alignment
        noised = self._noised(batch, self.transport.times(randomness.uniform(keys, randomness.TIME)), keys)
        if alignment is None:
            return self._losses(noised, batch["label"])
        target = alignment.teach(batch, noised)  # first, while no pass is under way that a backward pass will follow
        with tokens_after(self.network, alignment.config.block) as tokens:
            losses = self._losses(noised, batch["label"])
        with autocast(self.precision, losses.device.type):
            projected = self.projector(tokens[0])
        alignment.distances = alignment.distance(projected.float(), target.float())
        return losses

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The mean over the samples."""
        return outputs.mean()

    def eval_forward(self, batch: dict[str, Tensor], outputs: Tensor | None = None) -> Tensor:
        """The loss per sample, (N,), at a time and noise that the sample's index alone determines.

        So evaluations differ by the weights alone. (If the ranks don't divide the samples, a few are counted twice.)
        The times are the golden ratio's sequence, which is spread evenly over the interval.
        """
        t0, t1 = self.transport.interval()
        t = ((batch["index"].double() * GOLDEN_RATIO + 0.5) % 1 * (t1 - t0) + t0).float()
        return self._losses(self._noised(batch, t, batch["index"]), batch["label"])

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        return {} if is_train else {"loss": MeanMetric()}

    def update_metric(self, batch: dict[str, Tensor], outputs: Tensor, metric: Metric) -> None:
        metric.update(outputs)

    def flops_per_batch(self, batch: dict[str, Tensor]) -> int:
        """FLOPs of a training step on this batch."""
        alignment = None if self.alignment is None else self.alignment.config
        return sample_flops(self.network, alignment, self.projector) * len(batch["label"])
