"""Finds, checks and builds Composer's classes by name; checks parse its source, as importing it is slow."""

import ast
import contextlib
import importlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from sit_composer.cli import require
from sit_composer.config.schema import ConfigError, suggest
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
PLAIN = {"bool": bool, "int": int, "float": float, "str": str, "None": type(None)}


@cache
def _tree(path: str) -> ast.Module:
    """The syntax tree of a file in Composer's package."""
    composer = importlib.util.find_spec("composer")
    if composer is None or not composer.submodule_search_locations:
        raise UserError("composer: mosaicml, which has this package, is not installed; run `make install`")
    return ast.parse(Path(composer.submodule_search_locations[0], path).read_text())


def find_class(section: str, name: str) -> tuple[str, str]:
    """A class's name and module for its name in the YAML: SpeedMonitor's for speed_monitor."""
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


def _arguments(class_name: str, tree: ast.Module) -> dict[str, tuple[ast.expr | None, bool]] | None:
    """{argument: (annotation, required)} of a class; None if it accepts any (``**kwargs``) or inherits them."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == class_name]
    methods = [method for node in classes for method in node.body if isinstance(method, ast.FunctionDef)]
    given = next((method.args for method in methods if method.name == "__init__"), None)
    if given is None:
        return {} if classes and not classes[0].bases else None
    if given.kwarg is not None:
        return None
    positional = given.args[1:]
    required = len(positional) - len(given.defaults)
    found = {a.arg: (a.annotation, i < required) for i, a in enumerate(positional)}
    only = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    return found | {a.arg: (a.annotation, default is None) for a, default in only}


def check(key: str, arguments: dict[str, Any], class_name: str, file: str) -> None:
    """Checks the names, plain types and presence of a key's arguments, for a class in a file of Composer's package."""
    known = _arguments(class_name, _tree(file))
    if known is None:
        return
    for name, value in arguments.items():
        if name not in known:
            hint = suggest(name, {argument: argument for argument in known})
            raise UserError(f"{key}.{name}: {class_name} has no such argument; {hint}")
        annotation = known[name][0]
        text = ast.unparse(annotation).replace("Optional[", "Union[None, ") if annotation else ""
        types = {part.strip() for part in text.replace("Union[", "").replace("]", "").replace("|", ",").split(",")}
        types.discard("Time")  # from YAML, a time is a string or an integer
        if types and types <= PLAIN.keys():  # else it admits something that isn't plain
            admitted = tuple(PLAIN[t] for t in types) + ((int,) if "float" in types else ())
            if not isinstance(value, admitted) or (isinstance(value, bool) and "bool" not in types):
                raise UserError(f"{key}.{name}: got {value!r}, expected {' or '.join(sorted(types))}")
    for name, (_, required) in known.items():
        if required and name not in arguments:
            raise UserError(f"{key}.{name}: no value; {class_name} needs one")


def check_group(section: str, name: str, arguments: dict[str, Any]) -> None:
    """`check` for a callback, logger, algorithm or scheduler of Composer's, by its name in the YAML."""
    class_name, module = find_class(section, name)
    path = module.removeprefix("composer.").replace(".", "/")
    for file in (f"{path}.py", f"{path}/{path.rpartition('/')[2]}.py"):  # a module, or a package's module of its name
        with contextlib.suppress(FileNotFoundError):
            return check(f"{section}.{name}", arguments, class_name, file)


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
