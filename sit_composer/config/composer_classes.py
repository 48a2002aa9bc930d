"""Finds, checks and builds Composer's classes by name; checks parse its source, as importing it is slow."""

import ast
import importlib
import importlib.util
from functools import cache, reduce
from operator import or_
from pathlib import Path
from types import GenericAlias, NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_origin

from sit_composer.choices import COUNT
from sit_composer.cli import require
from sit_composer.config.schema import ConfigError, suggest
from sit_composer.config.times import ANY, UNITS, check_time
from sit_composer.errors import UserError, one_line

GROUPS = {  # section of the YAML: (package whose __init__ exports the classes, ending of their names)
    "callbacks": ("callbacks", ""),
    "loggers": ("loggers", "logger"),
    "algorithms": ("algorithms", ""),
    "scheduler": ("optim", "scheduler"),
}
PACKAGES = {  # that a logger imports once it is made
    "CometMLLogger": "comet_ml", "MLFlowLogger": "mlflow", "NeptuneLogger": "neptune", "SlackLogger": "slack_sdk",
    "TensorboardLogger": "tensorboard", "WandBLogger": "wandb",
}  # fmt: skip


class Time:
    """Composer's, which a YAML holds as text, such as 10ba."""


class Argument(NamedTuple):
    """An argument of a class: its type, Any for what a YAML can't hold, and whether it must be given."""

    type: Any
    required: bool


class Signature(NamedTuple):
    """A class's name and arguments, and whether it admits others (``**kwargs``, or those of the class it inherits)."""

    name: str
    arguments: dict[str, Argument]
    others: bool


PLAIN = {"bool": bool, "int": int, "float": float, "str": str, "Time": Time}


@cache
def _tree(path: str) -> ast.Module:
    """The syntax tree of a file in Composer's package."""
    composer = importlib.util.find_spec("composer")
    if composer is None or not composer.submodule_search_locations:
        raise UserError("composer: mosaicml, which has this package, is not installed; run `make install`")
    return ast.parse(Path(composer.submodule_search_locations[0], path).read_text())


def find_class(section: str, name: str) -> tuple[str, str]:
    """A class's name and module for its name in the YAML: SpeedMonitor's for speed_monitor."""
    if section == "trainer":
        return "Trainer", "composer.trainer.trainer"
    package, ending = GROUPS[section]
    classes = {}
    for node in _tree(f"{package}/__init__.py").body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"composer.{package}."):
            for exported in (alias.name for alias in node.names):
                if exported.lower().endswith(ending) and exported not in ("Logger", "ComposerScheduler"):
                    classes[exported.lower().removesuffix(ending)] = (exported, node.module)
    wanted = name.replace("_", "").lower().removesuffix(ending)
    if wanted not in classes:
        hint = suggest(wanted, {plain: exported for plain, (exported, _) in sorted(classes.items())})
        raise UserError(f"{section}.{name}: Composer has no such class; {hint}")
    return classes[wanted]


@cache
def signature(section: str, name: str = "") -> Signature:
    """The signature of the class that a section's entry names, or of the Trainer, read from Composer's source."""
    class_name, module = find_class(section, name)
    path = module.removeprefix("composer.").replace(".", "/")
    try:
        tree = _tree(f"{path}.py")
    except FileNotFoundError:  # a package, whose module has its name
        tree = _tree(f"{path}/{path.rpartition('/')[2]}.py")
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == class_name]
    methods = [method for node in classes for method in node.body if isinstance(method, ast.FunctionDef)]
    given = next((method.args for method in methods if method.name == "__init__"), None)
    if given is None:
        return Signature(class_name, {}, others=not classes or bool(classes[0].bases))
    positional = given.args[1:]
    required = len(positional) - len(given.defaults)
    found = {a.arg: Argument(_type(a.annotation), i < required) for i, a in enumerate(positional)}
    only = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    found |= {a.arg: Argument(_type(a.annotation), default is None) for a, default in only}
    return Signature(class_name, found, others=given.kwarg is not None)


def _type(annotation: ast.expr | None) -> Any:
    """The type that an annotation says; Any for one that a YAML can't hold."""
    match annotation:
        case ast.Constant(value=None):
            return None
        case ast.Name(id=name):
            return PLAIN.get(name, Any)
        case ast.BinOp(left=left, right=right):
            return _type(left) | _type(right)
        case ast.Subscript(value=ast.Name(id=name), slice=inner):
            parts = [_type(part) for part in (inner.elts if isinstance(inner, ast.Tuple) else [inner])]
            if name in ("Optional", "Union"):
                return reduce(or_, parts) if name == "Union" else parts[0] | None
            if name in ("list", "Sequence"):
                return GenericAlias(list, (parts[0],))
            return GenericAlias(dict, (str, parts[-1])) if name == "dict" else PLAIN.get(name, Any)  # or Time[int]
    return Any


def options(kind: Any) -> tuple[Any, ...]:
    """The types of a union; of another type, only itself."""
    return get_args(kind) if isinstance(kind, UnionType) else (kind,)


def check(section: str, name: str, arguments: dict[str, Any]) -> None:
    """Checks the names, plain types and presence of an entry's arguments; for ``trainer``, the name is empty."""
    class_name, known, others = signature(section, name)
    key = f"{section}.{name}" if name else section
    for argument, value in arguments.items():
        if argument in known:
            _check_value(section, f"{key}.{argument}", known[argument].type, value)
        elif not others:
            hint = suggest(argument, {argument: argument for argument in known})
            raise UserError(f"{key}.{argument}: {class_name} has no such argument; {hint}")
    for argument, (_, required) in known.items():
        if required and argument not in arguments:
            raise UserError(f"{key}.{argument}: no value; {class_name} needs one")


def _check_value(section: str, key: str, kind: Any, value: Any) -> None:
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise UserError(f"{key}: got {value!r}, expected a list")
        for item in value:
            _check_value(section, key, get_args(kind)[0], item)
        return
    types = set(options(kind))
    argument = key.rpartition(".")[2]
    if (Time in types and float not in types) or argument in UNITS:  # a number is a part of the run where both are
        check_time(key, value, UNITS.get(argument) or (ANY if section == "scheduler" else ("ba", "ep")))
    elif types <= {*PLAIN.values(), NoneType}:  # else it admits something that isn't plain
        admitted = (*types, int) if float in types else tuple(types)
        if not isinstance(value, admitted) or (isinstance(value, bool) and bool not in types):
            names = sorted("None" if t is NoneType else t.__name__ for t in types - {Time})
            raise UserError(f"{key}: got {value!r}, expected {' or '.join(names)}")
        if argument.endswith("interval") and value is not None:
            COUNT.check(key, value)


def check_package(section: str, name: str) -> None:
    """Checks that the package which an entry's class needs is installed."""
    if package := PACKAGES.get(find_class(section, name)[0]):
        require(f"{section}.{name}", package)


def build(section: str, entries: dict[str, Any]) -> list[Any]:
    """The objects of Composer's classes that a section of the YAML names."""
    built = []
    for name, arguments in entries.items():
        class_name, module = find_class(section, name)
        try:
            built.append(getattr(importlib.import_module(module), class_name)(**(arguments or {})))
        except Exception as error:  # a class may refuse its arguments in any way, or miss a package
            raise ConfigError(f"{section}.{name}: {one_line(error)}") from error
    return built
