"""What a checkpoint's weights mean, kept in every checkpoint."""

import json
from collections.abc import Callable
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger


class RunRecord(Callback):
    """Keeps in every checkpoint what its weights mean: the network, the transport, the autoencoder, the classes.

    So a checkpoint can be sampled from wherever it was moved to. ``save_config`` is called once, when the first batch
    is about to be trained: a run that was refused, or is finished, leaves no config behind.
    """

    def __init__(self, record: dict[str, Any], save_config: Callable[[], None] | None = None):
        self.record = record
        self.save_config = save_config

    def batch_start(self, state: State, logger: Logger) -> None:
        if self.save_config is not None:
            self.save_config()
            self.save_config = None

    def state_dict(self) -> dict[str, Any]:
        # As one text: sharded loading goes into dicts, writes to what it finds there, and misses what it doesn't.
        return {"record": json.dumps(self.record)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        theirs, ours = json.loads(state["record"])["classes"], self.record["classes"]
        if theirs != ours:
            pairs = enumerate(zip(theirs, ours, strict=False))
            label = next((i for i, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
            raise ValueError(f"the checkpoint was trained on other classes than the data has, from label {label} on")
