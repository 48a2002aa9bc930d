"""Whether a config fits the earlier run that it would resume."""

from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sit_composer.choices import BLOCKS
from sit_composer.cli import is_hub_name, is_remote
from sit_composer.config.load import read_yaml
from sit_composer.config.schema import Config, ConfigError, averages, is_plain, network_arguments
from sit_composer.errors import NewerVersion, first_line

CONFIG = "config.yaml"  # the resolved config, beside a run's checkpoints


def check_same_run(config: Config) -> None:
    """Checks that a local run of the same name, which this one would resume, has the same network and objective."""
    folder = str(config.trainer.get("save_folder") or "").replace("{run_name}", config.run_name)
    saved = Path(folder, CONFIG)
    if folder and not is_remote(folder) and config.trainer.get("autoresume") and saved.is_file():
        check_same_config(config, saved.read_text(errors="replace"), str(saved))


def check_start(config: Config) -> None:
    """Checks that something is where ``init_from`` is, if it is on this machine and there is no run to resume."""
    folder, place = str(config.trainer.get("save_folder") or ""), config.init_from
    may_resume = is_remote(folder) or Path(folder.replace("{run_name}", config.run_name)).is_dir()
    if place is None or is_remote(place) or is_hub_name(place) or Path(place).exists() or (folder and may_resume):
        return
    raise ConfigError(f"init_from: no checkpoint in {place!r}, expected a checkpoint or the name of a model on the Hub")


def check_same_config(config: Config, text: str, where: str) -> None:
    """Checks that the run whose config has this text, read from ``where``, can be resumed with this config."""
    try:
        before = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), read_yaml(text, where)))
    except NewerVersion:
        raise
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{where}: not a run's config ({first_line(error)}); choose another run_name") from None
    folder = where.rpartition("/")[0]
    old, new = _fixed_keys(before), _fixed_keys(config)
    for name, value in new.items():
        if old.get(name) != value:
            expected = f"{old.get(name)}, the value of the run in {folder}, which this one would resume"
            raise ConfigError(f"{name}: got {value}, expected {expected}; choose another run_name or save_folder")


def _fixed_keys(config: Config) -> dict[str, object]:
    """The keys that can't change between a run and its resumption."""
    keys: dict[str, object] = {name: getattr(config, name) for name in ("seed", "init_from", "init_weights", "freeze")}
    names = averages(config)  # of which the decay of a single one may change
    keys["ema"] = "one exponential average" if names and is_plain(names) else ", ".join(names) or None
    alignment = {} if config.alignment is None else vars(config.alignment)
    keys |= {"alignment": alignment.get("name"), **{f"alignment.{name}": value for name, value in alignment.items()}}
    sections = {name: vars(getattr(config, name)) for name in ("transport", "autoencoder", "optimizer")}
    for section, values in {"model": {**BLOCKS, **network_arguments(config.model)}, **sections}.items():
        keys |= {f"{section}.{name}": value for name, value in values.items()}
    del keys["optimizer.clip_norm"]  # no checkpoint holds it
    return keys
