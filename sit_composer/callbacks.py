"""What a run adds to Composer's callbacks: randomness that resumes, a record of what is trained, and sample grids."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from PIL import Image

from sit_composer.autoencoder import Autoencoder, to_uint8
from sit_composer.ema import EMAWeights
from sit_composer.gallery import write_grid
from sit_composer.guidance import Guidance
from sit_composer.sample import Sampling, generate


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
        return {"record": self.record}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        theirs, ours = state["record"]["classes"], self.record["classes"]
        if theirs != ours:
            pairs = enumerate(zip(theirs, ours, strict=False))
            label = next((i for i, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
            raise ValueError(f"the checkpoint was trained on other classes than the data has, from label {label} on")


class SampleGrid(Callback):
    """Draws the same pictures from the averaged weights every so often: a PNG in ``folder``, an image in the loggers.

    Their noise comes from generators of their own, and the network is in evaluation mode meanwhile: training's bits
    are the same with it and without.

    Args:
        interval: how often, a time string such as ``1000ba``; and at the end of training.
        labels: of the pictures, in order.
        sampling: how they are drawn.
        autoencoder: decodes them.
        weights: the average; None draws from the training weights.
        folder: where the PNGs go, as ``ba0001000.png``; None: to the loggers alone.
    """

    def __init__(
        self,
        interval: str,
        labels: list[int],
        sampling: Sampling,
        autoencoder: Autoencoder,
        weights: EMAWeights | None,
        folder: str | None,
    ):
        self.due = create_interval_scheduler(interval)
        self.labels = labels
        self.sampling = sampling
        self.autoencoder = autoencoder
        self.weights = weights
        self.folder = folder

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self.due(state, Event.BATCH_CHECKPOINT) and dist.get_global_rank() == 0:
            self.draw(state, logger)

    def draw(self, state: State, logger: Logger) -> None:
        """Draws and logs the grid."""
        model = state.model.module if hasattr(state.model, "module") else state.model  # DDP's wrapper
        training = model.training
        model.eval()
        with torch.no_grad(), self.weights.in_model() if self.weights is not None else nullcontext():
            guidance = Guidance(model.network, self.sampling.cfg_scale)
            latents, _ = generate(guidance, model.transport, self.labels, list(range(len(self.labels))), self.sampling)
        model.train(training)
        levels = to_uint8(self.autoencoder.decode(latents)).cpu()  # (N, C, H, W)
        batch = int(state.timestamp.batch)
        logger.log_images(levels.float().div(255), name="samples", channels_last=False, step=batch)
        if self.folder is not None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            arrays = levels.permute(0, 2, 3, 1).numpy()
            pictures = [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else np.ascontiguousarray(a)) for a in arrays]
            write_grid(pictures, self.labels, Path(self.folder) / f"ba{batch:07d}.png")
