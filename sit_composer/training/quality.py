"""The callbacks that draw images while training: to look at, and to measure."""

from collections.abc import Callable

import torch
from composer.core import Callback
from composer.utils import dist, format_name_with_dist

from sit_composer.algorithms.ema import EMAWeights
from sit_composer.autoencoder import Autoencoder
from sit_composer.callbacks.drawing import Drawing
from sit_composer.callbacks.frechet import FrechetDistance
from sit_composer.callbacks.sample_grid import SampleGrid
from sit_composer.choices import Sampling
from sit_composer.config.schema import Config, ConfigError, DrawingConfig
from sit_composer.errors import UserError
from sit_composer.evaluation.features import load_extractor
from sit_composer.evaluation.judge import check_statistics
from sit_composer.evaluation.metrics import STATISTICS
from sit_composer.evaluation.picture_sets import open_set


def quality(
    config: Config, autoencoder: "Autoencoder", weights: "EMAWeights | None", before_each: Callable[[], None]
) -> "list[Callback]":
    """The callbacks that draw pictures during training: to look at, and to measure."""

    def drawing(section: DrawingConfig, labels: list[int]) -> Drawing:
        options = {name: getattr(section, name) for name in ("sampling_method", "num_steps", "cfg_scale", "seed")}
        return Drawing(labels, Sampling(**options), autoencoder, weights, section.batch_size, before_each)

    callbacks = []
    grid, frechet, classes = config.sample_grid, config.frechet, config.model.num_classes
    folder = config.trainer.get("save_folder")
    folder = None if folder is None or "://" in folder else format_name_with_dist(folder, config.run_name)
    if grid is not None:
        chosen = grid.labels or [i * classes // 10 for i in range(min(10, classes))]
        labels = [label for label in chosen for _ in range(grid.per_class)]
        callbacks.append(SampleGrid(grid.interval, drawing(grid, labels), folder and f"{folder}/samples"))
    if frechet is not None:
        with dist.run_local_rank_zero_first():  # it fetches Inception's weights
            try:
                extractor = load_extractor(frechet.features)
            except UserError as error:
                raise ConfigError(str(error).replace("--features", "frechet.features")) from error
        reference = open_set(frechet.reference)
        check_statistics(reference, extractor)
        if "mu" not in reference.statistics:
            raise ConfigError(
                f"frechet.reference: {frechet.reference} has no statistics of {frechet.features}; "
                "sit_composer.evaluate --save-statistics writes some"
            )
        side = config.model.input_size * autoencoder.spec.downsample
        probe = extractor(torch.zeros(2, 3, side, side, dtype=torch.uint8))["features"]  # now, not in ten hours
        if reference.statistics["mu"].shape != probe.shape[1:]:
            raise ConfigError(
                f"frechet.reference: {frechet.reference} is of {reference.statistics['mu'].size} features; "
                f"{frechet.features} gives {probe.shape[1]}"
            )
        labels = [i * classes // frechet.num_images for i in range(frechet.num_images)]
        real = tuple(reference.statistics[name] for name in STATISTICS["features"])
        file = folder and f"{folder}/frechet.json"
        callbacks.append(FrechetDistance(frechet.interval, drawing(frechet, labels), extractor, real, file))
    return callbacks
