"""Reads a run's YAML and the command line's ``key=value`` into a `Config`. Torch is not imported."""

import dataclasses
import difflib
import re

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from sit_composer.config.schema import (
    AutoencoderConfig,
    Config,
    ConfigError,
    DataConfig,
    EMAConfig,
    FrechetConfig,
    FSDPConfig,
    ModelConfig,
    OptimizerConfig,
    SampleGridConfig,
    SupervisionConfig,
    TransportConfig,
)

TYPE_NAMES = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}  # in OmegaConf's messages


def documentation(cls: type = Config, prefix: str = "") -> str:
    """A line for each key: its name, its default and its meaning."""
    lines = []
    for f in dataclasses.fields(cls):
        section = next((s for s in SECTIONS if s.__name__ in str(f.type)), None)
        if section is not None and f.name != "eval_data":
            if f.default_factory() is None:
                lines.append(f"  {f.name:<28} {f.metadata['doc']} [null]")
            lines.append(documentation(section, f"{prefix}{f.name}."))
            continue
        default = f.default_factory()
        shown = "???" if default == MISSING else "null" if default is None else str(default)
        lines.append(f"  {prefix + f.name:<28} {f.metadata['doc']} [{shown}]")
    return "\n".join(lines)


SECTIONS = [
    *(ModelConfig, TransportConfig, AutoencoderConfig, DataConfig, OptimizerConfig, EMAConfig),
    *(SampleGridConfig, FrechetConfig, FSDPConfig, SupervisionConfig),
]


def load_config(path: str, overrides: list[str]) -> Config:
    """Reads a YAML, puts the command line's ``key=value`` over it: keys and types are right then, values not checked.

    Raises:
        ConfigError: naming the key, what it got and what it takes.
    """
    try:
        file = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(file):
        raise ConfigError(f"{path}: not a YAML of keys and values")
    for item in overrides:
        if not re.fullmatch(r"[\w.]+=.*", item, re.DOTALL):
            raise ConfigError(f"{item!r}: an override is written key=value, such as trainer.max_duration=10ba")
    config = OmegaConf.structured(Config)
    try:
        config = OmegaConf.merge(config, file)
        if any(item.startswith("scheduler=") for item in overrides):
            config.scheduler = {}  # there is only one: another takes the YAML's place
        config = OmegaConf.merge(config, OmegaConf.from_dotlist(overrides))
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(f"{missing[0]}: no value; give one in {path} or as {missing[0]}=… behind it")
        config = OmegaConf.to_object(config)
    except ConfigKeyError as error:
        raise ConfigError(_unknown_key(error)) from None
    except (OmegaConfBaseException, yaml.YAMLError, TypeError) as error:
        where = f"{error.full_key}: " if getattr(error, "full_key", None) else f"{' '.join(overrides) or path}: "
        raise ConfigError(where + _wrong_type(str(getattr(error, "msg", None) or error))) from None
    return config


def _wrong_type(message: str) -> str:
    first = (message.strip().splitlines() or ["not a value for this key"])[0]
    match = re.fullmatch(r"Value '(.*)' (?:of type '.*' could not be converted to|is not a valid) (\w+).*", first)
    return f"got {match[1]!r}; it takes {TYPE_NAMES.get(match[2], match[2])}" if match else first


def _unknown_key(error: ConfigKeyError) -> str:
    known = (
        [f.name for f in dataclasses.fields(error.object_type)] if dataclasses.is_dataclass(error.object_type) else []
    )
    close = difflib.get_close_matches(str(error.key), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(known)}"
    return f"{error.full_key}: no such key; {hint}"
