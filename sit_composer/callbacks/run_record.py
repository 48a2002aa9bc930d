"""The record of the network in every checkpoint."""

import json
from collections.abc import Callable
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger

from sit_composer.checkpoint.record import VERSION, Record
from sit_composer.errors import check_version


class RunRecord(Callback):
    """Keeps the record of the network in every checkpoint, so that it can be sampled from wherever it is moved to.

    ``save_config`` is called before the first batch: a run that is refused, or is finished already, saves no config.
    """

    def __init__(self, record: Record, save_config: Callable[[], None] | None = None):
        self.record = record
        self.save_config = save_config

    def batch_start(self, state: State, logger: Logger) -> None:
        if self.save_config is not None:
            self.save_config()
            self.save_config = None

    def state_dict(self) -> dict[str, Any]:
        # One text, not a dict: sharded loading fills in dicts that exist, and misses keys that they lack.
        return {"record": json.dumps({"version": VERSION, **self.record.as_dict()})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        record = json.loads(state["record"])
        check_version(record.get("version"), VERSION, "the checkpoint")
        theirs, ours = record["classes"], self.record.classes
        if theirs != ours:
            pairs = enumerate(zip(theirs, ours, strict=False))
            label = next((i for i, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
            raise ValueError(f"the checkpoint was trained on other classes than the data has, from label {label} on")
