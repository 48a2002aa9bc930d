"""Whether a config fits the earlier run that it would resume."""

from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sit_composer.config.schema import Config, ConfigError, network_arguments

CONFIG = "config.yaml"  # the resolved one, beside a run's checkpoints


def check_same_run(config: Config) -> None:
    """Checks that a local run of the same name, which this one would resume, is of the same network and objective."""
    folder = str(config.trainer.get("save_folder") or "").replace("{run_name}", config.run_name)
    saved = Path(folder, CONFIG)
    if folder and "://" not in folder and config.trainer.get("autoresume") and saved.is_file():
        check_same_config(config, saved.read_text(errors="replace"), str(saved))


def check_same_config(config: Config, text: str, where: str) -> None:
    """Checks that a run of that config, read from ``where``, can be resumed with this one."""
    try:
        before = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text)))
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
        raise ConfigError(f"{where}: not a run's config ({type(error).__name__}); choose another run_name") from None
    folder = where.rpartition("/")[0]
    if before.seed != config.seed:
        raise ConfigError(
            f"seed: got {config.seed}; the run in {folder}, which this one would resume, has {before.seed}"
        )
    if (before.ema is None) != (config.ema is None):
        theirs = "none" if before.ema is None else f"one of decay {before.ema.decay}"
        raise ConfigError(
            f"ema: the run in {folder}, which this one would resume, has {theirs}; choose another run_name"
        )
    pairs = [("model", network_arguments(before.model), network_arguments(config.model))]
    pairs += [
        (s, vars(getattr(before, s)), vars(getattr(config, s))) for s in ("transport", "autoencoder", "optimizer")
    ]
    for section, old, new in pairs:
        for name, value in new.items():
            if old[name] != value:
                raise ConfigError(
                    f"{section}.{name}: got {value}; the run in {folder}, which this one would resume, has "
                    f"{old[name]}. Choose another run_name or save_folder"
                )
