"""Builds the callbacks that generate images while training: to look at, and to measure."""

import torch
from composer.core import Callback
from composer.utils import dist, format_name_with_dist

from sit_composer.algorithms.ema import EMAWeights
from sit_composer.autoencoder import load_autoencoder
from sit_composer.callbacks.drawing import Drawing
from sit_composer.callbacks.frechet import FrechetDistance
from sit_composer.callbacks.sample_grid import SampleGrid
from sit_composer.choices import Sampling
from sit_composer.cli import is_remote
from sit_composer.config.schema import Config, ConfigError, DrawingConfig, transport_arguments
from sit_composer.errors import UserError
from sit_composer.evaluation.features import Extractor, load_extractor
from sit_composer.evaluation.judge import check_statistics
from sit_composer.evaluation.metrics import STATISTICS
from sit_composer.evaluation.picture_sets import open_set
from sit_composer.supervision.supervisor import Supervision
from sit_composer.training.inputs import Inputs
from sit_composer.transport import Transport


def quality_callbacks(
    config: Config, inputs: Inputs, weights: EMAWeights | None, supervision: Supervision, device: str
) -> list[Callback]:
    """The callbacks of the sections sample_grid and frechet."""
    grid, frechet, classes = config.sample_grid, config.frechet, config.model.num_classes
    of, name = inputs.autoencoder, config.autoencoder.name
    autoencoder = inputs.encoder or load_autoencoder(name, of.channels, device, latents=of)
    folder = config.trainer.get("save_folder")
    folder = None if folder is None or is_remote(folder) else format_name_with_dist(folder, config.run_name)

    def drawing(section: DrawingConfig, labels: list[int]) -> Drawing:
        options = {name: getattr(section, name) for name in ("sampling_method", "num_steps", "cfg_scale", "seed")}
        sampling = Sampling(**options, time_shift=Transport(**transport_arguments(config)).sampling_shift)
        return Drawing(labels, sampling, autoencoder, weights, section.batch_size, supervision.eviction.leave_if_told)

    callbacks = []
    if grid is not None:
        chosen = grid.labels or [i * classes // 10 for i in range(min(10, classes))]
        labels = [label for label in chosen for _ in range(grid.per_class)]
        names = inputs.specs["data"].classes
        write = supervision.put if supervision.folder is not None else None
        callbacks.append(SampleGrid(grid.interval, drawing(grid, labels), names, write))
    if frechet is not None:
        try:
            with dist.run_local_rank_zero_first():  # it downloads Inception's weights
                extractor = load_extractor(frechet.features)
        except UserError as error:
            raise ConfigError(str(error).replace("--features", "frechet.features")) from error
        real = _load_reference(config, extractor, config.model.input_size * autoencoder.spec.downsample)
        labels = [i * classes // frechet.num_images for i in range(frechet.num_images)]
        file = folder and f"{folder}/frechet.json"
        callbacks.append(FrechetDistance(frechet.interval, drawing(frechet, labels), extractor, real, file))
    return callbacks


def _load_reference(config: Config, extractor: Extractor, side: int) -> tuple:
    """The reference's statistics, once they are known to fit the features of generated images."""
    name, features = config.frechet.reference, config.frechet.features
    reference = open_set(name)
    check_statistics(reference, extractor)
    if "mu" not in reference.statistics:
        advice = "sit_composer.evaluate --save-statistics writes them"
        raise ConfigError(f"frechet.reference: {name} has no statistics of {features}; {advice}")
    probe = extractor(torch.zeros(2, 3, side, side, dtype=torch.uint8))["features"]  # fails now, not in ten hours
    mu, expected = reference.statistics["mu"], probe.shape[1]
    if mu.shape != (expected,):
        raise ConfigError(f"frechet.reference: {name} has {mu.size} features, expected {expected}, those of {features}")
    return tuple(reference.statistics[name] for name in STATISTICS["features"])
