"""Measures the Fréchet distance during training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from torch import Tensor

from sit_composer.callbacks.drawing import Drawing
from sit_composer.evaluation.features import Extractor
from sit_composer.evaluation.metrics import frechet_distance, statistics
from sit_composer.outputs import write_json


class FrechetDistance(Callback):
    """Measures every so often how far drawn pictures are from real ones; logs ``metrics/frechet_distance``.

    The values so far are in the checkpoint, so that a resumed run has those that an uninterrupted one has. With few
    pictures the number is biased upwards: compare it with others of the same count only.

    Args:
        interval: how often, a time string such as ``10000ba``; and at the end of training.
        drawing: what is drawn.
        extractor: gives the pictures' features.
        reference: mean (D,) and covariance (D, D) of the real ones' features.
        file: where the values go, as JSON; None: to the loggers alone.
    """

    def __init__(
        self,
        interval: str,
        drawing: Drawing,
        extractor: Extractor,
        reference: tuple[np.ndarray, np.ndarray],
        file: str | None,
    ):
        self.due = create_interval_scheduler(interval)
        self.drawing = drawing
        self.extractor = extractor
        self.reference = reference
        self.file = file
        self.values: dict[str, float] = {}  # batch -> distance

    def batch_checkpoint(self, state: State, logger: Logger, event: Event = Event.BATCH_CHECKPOINT) -> None:
        if not self.due(state, event):
            return
        features = self.drawing(state, self.features).cpu().numpy()  # (N, D)
        distance: list[float | None] = [None]
        if dist.get_global_rank() == 0:
            distance = [frechet_distance(*statistics(features), *self.reference)]
        dist.broadcast_object_list(distance)
        batch = int(state.timestamp.batch)
        self.values[str(batch)] = distance[0]
        logger.log_metrics({"metrics/frechet_distance": distance[0]})
        if dist.get_global_rank() != 0:
            return
        print(f"batch {batch}: Fréchet distance {distance[0]:.2f} of {len(self.drawing.labels)} pictures", flush=True)
        if self.file is not None:
            Path(self.file).parent.mkdir(parents=True, exist_ok=True)
            names = ("sampling_method", "num_steps", "cfg_scale", "seed")
            what = {name: getattr(self.drawing.sampling, name) for name in names}
            what |= {"pictures": len(self.drawing.labels), "features": self.extractor.identity}
            write_json({**what, "frechet_distance": self.values}, Path(self.file))

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self.batch_checkpoint(state, logger, Event.EPOCH_CHECKPOINT)

    def features(self, pictures: Tensor) -> Tensor:
        """Features (n, D) of pictures (n, C, H, W)."""
        features = self.extractor(pictures.expand(-1, 3, -1, -1))["features"]
        return torch.from_numpy(features).to(pictures.device)

    def state_dict(self) -> dict[str, Any]:
        return {"values": json.dumps(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = json.loads(state["values"])
