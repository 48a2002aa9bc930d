"""Shows the same images during training, as they improve."""

from collections.abc import Callable

import numpy as np
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

from sit_composer.callbacks.drawing import Drawing, DrawingCallback
from sit_composer.captions import draw_samples
from sit_composer.gallery import as_image, png


class SampleGrid(DrawingCallback):
    """Generates the same images at each interval, for loggers and, as ``samples/ba0001000.png``, beside checkpoints.

    ``classes`` are the names of all classes, for the captions. ``write``, if given, writes a file of a name.
    """

    def __init__(self, interval: str, drawing: Drawing, classes: list[str], write: Callable[[str, bytes], None] | None):
        super().__init__(interval, drawing)
        self.classes = classes
        self.write = write

    def draw(self, state: State, logger: Logger) -> None:
        levels = self.drawing(state, lambda images: images).cpu()  # (N, C, H, W)
        if dist.get_global_rank() != 0:
            return
        batch = int(state.timestamp.batch)
        images = [as_image(image) for image in levels]
        grid = draw_samples(images, self.drawing.labels, self.classes, self.drawing.sampling.cfg_scale)
        logger.log_images(np.asarray(grid), name="samples", channels_last=True, step=batch, use_table=False)
        if self.write is not None:
            self.write(f"samples/ba{batch:07d}.png", png(grid))
