"""Measures the Fréchet distance during training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from sit_composer.callbacks.drawing import Drawing, DrawingCallback
from sit_composer.cli import say
from sit_composer.evaluation.features import Extractor
from sit_composer.evaluation.metrics import frechet_distance, statistics
from sit_composer.outputs import write_json

Statistics = tuple[np.ndarray, np.ndarray]  # mean (D,) and covariance (D, D) of images' features


class FrechetDistance(DrawingCallback):
    """Measures at each interval how far generated images are from real ones; logs ``metrics/frechet_distance``.

    The values so far are in the checkpoint, so a resumed run has the same as an uninterrupted one, and in the JSON file
    if one is given. With few images the number is biased upwards: compare only numbers of the same image count.
    """

    def __init__(self, interval: str, drawing: Drawing, extractor: Extractor, reference: Statistics, file: str | None):
        super().__init__(interval, drawing)
        self.extractor = extractor
        self.reference = reference
        self.file = file
        self.values: dict[str, float] = {}  # batch -> distance

    def draw(self, state: State, logger: Logger) -> None:
        features = self.drawing(state, self.features).cpu().numpy()  # (N, D)
        rank = dist.get_global_rank()
        found = [frechet_distance(*statistics(features), *self.reference) if rank == 0 else None]
        dist.broadcast_object_list(found)
        batch, distance = int(state.timestamp.batch), found[0]
        self.values[str(batch)] = distance
        logger.log_metrics({"metrics/frechet_distance": distance})
        count, sampling = len(self.drawing.labels), self.drawing.sampling
        name = "FDD" if self.extractor.name == "dinov2" else "Fréchet distance"
        say(f"batch {batch}: {name} {distance:.2f} of {count} images")
        if self.file is not None and rank == 0:
            Path(self.file).parent.mkdir(parents=True, exist_ok=True)
            settings = {k: getattr(sampling, k) for k in ("sampling_method", "num_steps", "cfg_scale", "seed")}
            settings |= {"pictures": count, "features": self.extractor.identity}
            write_json({**settings, "frechet_distance": self.values}, Path(self.file))

    def features(self, images: Tensor) -> Tensor:
        """Features (n, D) of images (n, C, H, W)."""
        return torch.from_numpy(self.extractor(images.expand(-1, 3, -1, -1))["features"]).to(images.device)

    def state_dict(self) -> dict[str, Any]:
        return {"values": json.dumps(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = json.loads(state["values"])
