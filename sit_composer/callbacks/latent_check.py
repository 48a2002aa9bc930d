"""A look at the first latents of a run."""

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from sit_composer.cli import say

SAMPLES = 16  # of the first batch


class LatentCheck(Callback):
    """Warns, before a run's first step, of latents that are far from what training expects; ``where`` names them.

    Only rank 0 looks, and only once, so that steps don't wait for it.
    """

    def __init__(self, where: str):
        self.where = where

    def after_dataloader(self, state: State, logger: Logger) -> None:
        if self.where and dist.get_global_rank() == 0:
            model = getattr(state.model, "module", state.model)  # inside DDP's wrapper
            batch = state.device.batch_to_device({name: values[:SAMPLES] for name, values in state.batch.items()})
            latents = model.latents(batch, batch["key"])
            if doubt := model.autoencoder.doubt(latents.mean().item(), latents.std().item()):
                say(f"warning: {self.where}: {doubt}")
        self.where = ""
