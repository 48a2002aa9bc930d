"""SRA, self-representation alignment (arXiv 2505.02831): the teacher is the run's own average.

The network's tokens after an early block are aligned with those that its average has after a later block, for the same
latents, noise and label at a time nearer to the data.
"""

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call
from torch.nn.functional import smooth_l1_loss

from sit_composer import randomness
from sit_composer.algorithms.alignment import Alignment, Noised
from sit_composer.algorithms.ema import EMAWeights
from sit_composer.algorithms.projector import build_projector, seeded, tokens_after
from sit_composer.config.schema import AlignmentConfig
from sit_composer.precision import autocast
from sit_composer.sit import SiT
from sit_composer.transport import Transport

BETA = 0.05  # of the smooth L1 loss, where the square turns into the absolute value; as released


class SRA(Alignment):
    """Aligns h(tokens of ``block`` at t) with the average's tokens of ``teacher_block`` at t' = t + u · time_offset.

    u is uniform in [0, 1), and t' ends where training's times do. d is the smooth L1 loss. A label that is dropped for
    the network is dropped for its teacher.
    """

    def __init__(
        self,
        config: AlignmentConfig,
        network: SiT,
        transport: Transport,
        weights: EMAWeights,
        precision: str = "fp32",
        seed: int = 0,
    ):
        super().__init__(config, seeded(lambda: build_projector(config, network.hidden_size), seed))
        self.network = network
        self.transport = transport
        self.weights = weights
        self.precision = precision

    @torch.no_grad()
    def teach(self, batch: dict[str, Tensor], noised: Noised) -> Tensor:
        later = noised.t + self.config.time_offset * randomness.uniform(batch["key"], randomness.TEACHER_TIME)
        t = later.clamp(max=self.transport.interval()[1])
        xt = self.transport.path.interpolate(t, noised.x0, noised.x1)[0]
        with autocast(self.precision, xt.device.type):
            return self._tokens(xt, t, batch["label"], noised.draws)

    def _tokens(self, *inputs: Tensor) -> Tensor:
        """The averaged network's tokens after ``teacher_block``."""
        if not isinstance(self.network, FSDPModule):  # the averages stand in for the weights, and nothing is copied
            means = {name.removeprefix("network."): p for name, p in self.weights.params.items()}
            return functional_call(self.network, means, inputs, {"stop": self.config.teacher_block}, tie_weights=False)
        # Sharded, both are exchanged in place, twice. All blocks run: FSDP2 has gathered the next one ahead, and would
        # keep what it gathered of the average.
        with self.weights.in_model(), tokens_after(self.network, self.config.teacher_block) as tokens:
            self.network(*inputs)
        torch.clear_autocast_cache()  # of the average's weights, where the Trainer's autocast is around all of this
        return tokens[0]

    def distance(self, projected: Tensor, target: Tensor) -> Tensor:
        return smooth_l1_loss(projected, target, reduction="none", beta=BETA).flatten(1).mean(1)
