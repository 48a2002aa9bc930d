"""Reads a run's YAML and the command line's ``key=value`` into a `Config`. Torch is not imported."""

import dataclasses
import re

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from sit_composer.config.schema import Config, ConfigError, suggest
from sit_composer.errors import first_line, one_line

TYPE_NAMES = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}  # in OmegaConf's messages


def load_config(path: str, overrides: list[str]) -> Config:
    """Reads a YAML, overridden by the command line's ``key=value``. Keys and types are checked, values are not."""
    try:
        file = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {one_line(error)}") from None
    if not OmegaConf.is_dict(file):
        raise ConfigError(f"{path}: not a YAML of keys and values")
    for item in overrides:
        if not re.fullmatch(r"[\w.]+=.*", item, re.DOTALL):
            raise ConfigError(f"{item!r}: invalid override, expected key=value, such as trainer.max_duration=10ba")
    try:
        config = OmegaConf.merge(OmegaConf.structured(Config), file)
        if any(item.startswith("scheduler=") for item in overrides):
            config.scheduler = {}  # there is only one: merging would keep the YAML's beside it
        config = OmegaConf.merge(config, OmegaConf.from_dotlist(overrides))
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(f"{missing[0]}: no value; set it in {path}, or as {missing[0]}=… on the command line")
        return OmegaConf.to_object(config)
    except ConfigKeyError as error:
        section = error.object_type
        known = {f.name: f.name for f in dataclasses.fields(section)} if dataclasses.is_dataclass(section) else {}
        raise ConfigError(f"{error.full_key}: no such key; {suggest(str(error.key), known)}") from None
    except (OmegaConfBaseException, yaml.YAMLError, TypeError) as error:
        where = getattr(error, "full_key", None) or " ".join(overrides) or path
        raise ConfigError(f"{where}: {_wrong_type(error)}") from None


def _wrong_type(error: Exception) -> str:
    """OmegaConf's message as ours: what the key got, and what is expected."""
    message = first_line(getattr(error, "msg", None) or error)
    match = re.fullmatch(r"Value '(.*)' (?:of type '.*' could not be converted to|is not a valid) (\w+).*", message)
    return f"got {match[1]!r}, expected {TYPE_NAMES.get(match[2], match[2])}" if match else message
