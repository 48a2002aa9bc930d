"""Batches that are not finite, as a damaged row or an overflow makes them."""

import math
from collections.abc import Callable, Collection

from composer.utils import dist

from sit_composer.callbacks.guard import Guard
from sit_composer.training.model import ComposerSiT

noised = ComposerSiT._noised


def poison(batches: Collection[int], set_attribute: Callable[..., None] = setattr, value: float = math.inf) -> None:
    """From now on, a number of these batches' last latent, on the last rank, is ``value``. The first batch is 1."""
    bad: list[int] = []  # the index of the sample

    def batch_start(self, state, logger):
        now = int(state.timestamp.batch) + 1 in batches and dist.get_global_rank() == dist.get_world_size() - 1
        bad[:] = state.batch["index"][-1:].tolist() if now else []

    def poisoned(self, batch, t, keys):
        found = noised(self, batch, t, keys)
        if self.training and batch["index"][-1:].tolist() == bad:
            found.x1[-1, 0, 0, 0] = value
        return found

    set_attribute(Guard, "batch_start", batch_start)
    set_attribute(ComposerSiT, "_noised", poisoned)
