"""Shows the same images during training, as they improve."""

from pathlib import Path

from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

from sit_composer.callbacks.drawing import Drawing, DrawingCallback
from sit_composer.gallery import as_image, write_grid


class SampleGrid(DrawingCallback):
    """Generates the same images at each interval, for the loggers and, as ``ba0001000.png``, in a folder if given."""

    def __init__(self, interval: str, drawing: Drawing, folder: str | None):
        super().__init__(interval, drawing)
        self.folder = folder

    def draw(self, state: State, logger: Logger) -> None:
        levels = self.drawing(state, lambda images: images).cpu()  # (N, C, H, W)
        if dist.get_global_rank() != 0:
            return
        batch = int(state.timestamp.batch)
        logger.log_images(levels.float().div(255), name="samples", channels_last=False, step=batch)
        if self.folder is not None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            write_grid(
                [as_image(image) for image in levels], self.drawing.labels, Path(self.folder) / f"ba{batch:07d}.png"
            )
