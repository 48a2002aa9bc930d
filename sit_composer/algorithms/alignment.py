"""What all alignments share: the tokens of an early block, projected, are to be near those of a teacher.

loss = denoising loss + weight · mean over samples of d(h(student's tokens), teacher's tokens), with a projector h that
is trained with the network, and a teacher that no gradient reaches.

The teacher is asked before the network's pass, and the tokens are caught in that pass: see `ComposerSiT.forward`. The
projector is a module of `ComposerSiT`, so that the optimizer, sharding and checkpoints have it; the network has not,
so that averages, exports and samples are as without it.
"""

from abc import abstractmethod
from typing import Any, NamedTuple

from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import Tensor, nn

from sit_composer import choices
from sit_composer.config.schema import AlignmentConfig


class Noised(NamedTuple):
    """What a pass of the network is about: N samples at a time of the path each."""

    t: Tensor  # times, (N,)
    x0: Tensor  # noise, (N, C, H, W)
    x1: Tensor  # latents, (N, C, H, W)
    draws: Tensor  # whose labels are dropped, see `SiT.forward`, (N,)


class Alignment(Algorithm):
    """Adds ``weight`` times the alignment to each microbatch's loss, and logs both parts."""

    def __init__(self, config: AlignmentConfig, projector: nn.Module):
        self.config = config
        self.weight = choices.ALIGNMENTS[config.name] if config.weight is None else config.weight
        self.projector = projector  # of tokens (N, T, D) to the teacher's (N, T, D')
        self.distances: Tensor | None = None  # of the last forward pass, (N,)

    @abstractmethod
    def teach(self, batch: dict[str, Tensor], noised: Noised) -> Tensor:
        """The teacher's tokens (N, T, D') for a batch, without a gradient."""

    @abstractmethod
    def distance(self, projected: Tensor, target: Tensor) -> Tensor:
        """d of each sample, (N,), for tokens (N, T, D') in float32."""

    def state_dict(self) -> dict[str, Any]:
        return {"repr": type(self).__name__}  # Composer's own has an address, other in each process

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_LOSS  # of training; evaluation has events of its own

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        alignment, self.distances = self.distances.mean(), None
        state.loss = {"total": state.loss + self.weight * alignment, "denoising": state.loss, "alignment": alignment}
