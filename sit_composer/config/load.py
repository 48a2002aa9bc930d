"""Reads a run's YAML and the command line's ``key=value`` into a `Config`. Torch is not imported.

A value is read by its key's type, which the schema or the signature of Composer's class gives. Text is kept as it was
typed: 12_34, 007, 1e5, no and 2024-01-01 are names too. Whole numbers are decimal.
"""

import dataclasses
import os
import re
from contextlib import suppress
from functools import reduce
from types import NoneType
from typing import Any, ClassVar, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from sit_composer.config.composer_classes import GROUPS, Signature, options, signature
from sit_composer.config.schema import VERSION, Config, ConfigError, suggest
from sit_composer.errors import UserError, check_version, first_line, one_line

TYPE_NAMES = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}  # in OmegaConf's messages
NULLS = ("", "~", "null", "Null", "NULL")
WORDS = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}
FLOAT = re.compile(r"[-+]?((\d+\.?\d*|\.\d+)(e[-+]?\d+)?|\.inf)|\.nan")


def load_config(path: str, overrides: list[str]) -> Config:
    """Reads a YAML, overridden by the command line's ``key=value``. Keys and types are checked, values are not."""
    try:
        with open(path, "rb") as file:
            content = read_yaml(file.read(), path)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror or error}") from None
    for item in overrides:
        if not re.fullmatch(r"[\w.]+=.*", item, re.DOTALL):
            raise ConfigError(f"{item!r}: invalid override, expected key=value, such as trainer.max_duration=10ba")
    for name, value in content.items():
        _check_section(name, value)
    try:
        config = OmegaConf.merge(OmegaConf.structured(Config), content)
        if any(item.startswith("scheduler=") for item in overrides):
            config.scheduler = {}  # there is only one: merging would keep the YAML's beside it
        given = OmegaConf.create()
        for name, value in map(_override, overrides):
            _check_section(name, value)
            OmegaConf.update(given, name, value)
        config = OmegaConf.merge(config, given)
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


class Plain(str):
    """A value as it was typed, without quotes."""


class Loader(yaml.SafeLoader):
    """Leaves every value of a YAML as its text, and refuses a key that is given twice."""

    yaml_implicit_resolvers: ClassVar = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # `<<` merges

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        names = [name.value for name, _ in node.value]
        if key := next((name for name in names if names.count(name) > 1), None):
            raise yaml.constructor.ConstructorError(problem=f"found duplicate key {key}", problem_mark=node.start_mark)
        return {str(name): value for name, value in super().construct_mapping(node, deep).items()}


Loader.add_constructor("tag:yaml.org,2002:str", lambda _, node: node.value if node.style else Plain(node.value))


def read_yaml(content: bytes | str, where: str) -> dict[str, Any]:
    """The keys and values of a run's YAML; ConfigError, naming ``where``, if it is none."""
    try:
        found = yaml.load(content, Loader)
        if isinstance(found, dict):
            typed = _typed(found, Config)
            check_version(typed.get("version"), VERSION, where)
            return typed
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: not YAML: {one_line(error)}") from None
    raise ConfigError(f"{where}: not a YAML of keys and values")


def _check_section(name: str, value: Any) -> None:
    """Raises ConfigError for a section that is no section."""
    kind = next((f.type for f in dataclasses.fields(Config) if f.name == name), None)
    kinds = [get_origin(part) or part for part in (kind, *get_args(kind))]
    is_section = dict in kinds or any(map(dataclasses.is_dataclass, kinds))
    if is_section and not isinstance(value, dict | None):
        raise ConfigError(f"{name}: got {value!r}, expected keys and values, such as {name}: {{key: value}}")


def _override(item: str) -> tuple[str, Any]:
    """The key and the value of ``key=value``: as typed, without quotes around it; lists and sections are YAML."""
    name, _, text = item.partition("=")
    if name == "init_from" and not text.strip():  # such as of a variable that isn't set
        raise ConfigError("init_from: no value, expected a checkpoint, or null for none")
    kind = reduce(_member, name.split("."), Config)
    is_yaml = re.fullmatch(r"'[^']*'|\"[^\"]*\"" if _is_text(kind) else r"\s*['\"\[{].*", text, re.DOTALL)
    return name, _typed(yaml.load(text, Loader) if is_yaml else Plain(text), kind)


def _typed(value: Any, kind: Any) -> Any:
    """What `Loader` read, with each value of its key's type, and ``~/`` as the home folder."""
    if isinstance(value, dict):
        return {name: _typed(item, _member(kind, name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_typed(item, _member(kind, "")) for item in value]
    if isinstance(value, Plain):
        value = _scalar(value, kind)
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _member(kind: Any, name: str) -> Any:
    """The type of a section's key, of an argument of Composer's class, or of a list's item; Any if it isn't known."""
    if kind is Config and name in ("trainer", *GROUPS):
        return signature("trainer") if name == "trainer" else name
    if isinstance(kind, str):  # the section of Composer's classes
        with suppress(UserError):  # no such class, which the checks tell
            return signature(kind, name)
    if isinstance(kind, Signature):
        return kind.arguments[name].type if name in kind.arguments else Any
    for option in options(kind):
        if dataclasses.is_dataclass(option):
            return next((f.type for f in dataclasses.fields(option) if f.name == name), Any)
        if get_origin(option) in (list, dict):
            return get_args(option)[-1]
    return Any


def _is_text(kind: Any) -> bool:
    return str in options(kind) and not {bool, int, float} & {*options(kind)}


def _scalar(text: Plain, kind: Any) -> Any:
    """The value of a text without quotes: by YAML 1.2's rules, unless the type says more."""
    types, is_text, word = options(kind), _is_text(kind), text.strip().lower()
    if text in NULLS and (NoneType in types or not is_text):
        return None
    if is_text:
        return str(text)
    is_known = any(plain in types for plain in (bool, int, float, str))
    if word in WORDS and (bool in types or (word in ("true", "false") and not is_known)):
        return WORDS[word]
    either = float in types and str in types  # of which OmegaConf takes no int for the number
    if int in types or (re.fullmatch(r"[-+]?\d+", word) and not either):
        with suppress(ValueError):
            return int(word)  # 1_000 too, where a number is expected
    if FLOAT.fullmatch(word) and (float in types or not is_known):
        return float(re.sub(r"\.(?=[in])", "", word))
    return str(text)


def _wrong_type(error: Exception) -> str:
    """OmegaConf's message as ours: what the key got, and what is expected."""
    message = first_line(getattr(error, "msg", None) or error)
    if "is not a ListConfig" in message:
        return "expected a list in brackets, such as [1, 2]"
    match = re.fullmatch(r"Value '(.*)' (?:of type '.*' could not be converted to|is not a valid) (\w+).*", message)
    return f"got {match[1]!r}, expected {TYPE_NAMES.get(match[2], match[2])}" if match else message
