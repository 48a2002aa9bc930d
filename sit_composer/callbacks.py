"""What a run needs of Composer's loop beside its own callbacks: randomness that resumes, and a record of the config."""

from typing import Any

from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import reproducibility


class ResumeRandomness(Callback):
    """Restores the random state when a run resumes in the middle of an epoch.

    Composer 0.32 loads the state, but restores it only at an epoch's start, or while it replays batches itself. A
    StreamingDataset replays nothing, so that after a resume in mid-epoch the data would be right and the noise not.
    Set ``trainer`` once there is one.
    """

    trainer: Trainer | None = None

    def after_dataloader(self, state: State, logger: Logger) -> None:
        if self.trainer is not None and self.trainer._rng_state is not None and "train" in state.dataset_resumption:
            reproducibility.load_rng_state(self.trainer._rng_state)
            self.trainer._rng_state = None


class RunRecord(Callback):
    """Keeps in every checkpoint what its weights mean: the network, the transport, the autoencoder, the classes.

    So a checkpoint can be sampled from wherever it was moved to.
    """

    def __init__(self, record: dict[str, Any]):
        self.record = record

    def state_dict(self) -> dict[str, Any]:
        return {"record": self.record}
