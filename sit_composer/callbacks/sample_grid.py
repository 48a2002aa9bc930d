"""Draws the same images during training."""

from pathlib import Path

import numpy as np
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from PIL import Image

from sit_composer.callbacks.drawing import Drawing
from sit_composer.gallery import write_grid


class SampleGrid(Callback):
    """Draws the same pictures every so often: a PNG in ``folder``, an image in the loggers.

    Args:
        interval: how often, a time string such as ``1000ba``; and at the end of training.
        drawing: what is drawn.
        folder: where the PNGs go, as ``ba0001000.png``; None: to the loggers alone.
    """

    def __init__(self, interval: str, drawing: Drawing, folder: str | None):
        self.due = create_interval_scheduler(interval)
        self.drawing = drawing
        self.folder = folder

    def batch_checkpoint(self, state: State, logger: Logger, event: Event = Event.BATCH_CHECKPOINT) -> None:
        if not self.due(state, event):
            return
        levels = self.drawing(state, lambda pictures: pictures).cpu()  # (N, C, H, W)
        if dist.get_global_rank() != 0:
            return
        batch = int(state.timestamp.batch)
        logger.log_images(levels.float().div(255), name="samples", channels_last=False, step=batch)
        if self.folder is not None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            arrays = levels.permute(0, 2, 3, 1).numpy()
            pictures = [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else np.ascontiguousarray(a)) for a in arrays]
            write_grid(pictures, self.drawing.labels, Path(self.folder) / f"ba{batch:07d}.png")

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self.batch_checkpoint(state, logger, Event.EPOCH_CHECKPOINT)
