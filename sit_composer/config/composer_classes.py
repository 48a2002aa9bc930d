"""What Composer's classes take, read from its source: importing Composer takes 15 s, and a misspelt key should not."""

import ast
import difflib
import importlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from sit_composer.choices import choose
from sit_composer.config.schema import ConfigError
from sit_composer.errors import UserError

GROUPS = {  # section of the YAML: (package whose __init__ exports the classes, what their names end with)
    "callbacks": ("callbacks", ""),
    "loggers": ("loggers", "logger"),
    "algorithms": ("algorithms", ""),
    "scheduler": ("optim", "scheduler"),
}
PLAIN = {"bool": bool, "int": int, "float": float, "str": str, "None": type(None)}


@cache
def _tree(*path: str) -> ast.Module:
    composer = importlib.util.find_spec("composer")
    if composer is None or not composer.submodule_search_locations:
        raise UserError("mosaicml (the package composer) is not installed: run `make install`")
    return ast.parse(Path(composer.submodule_search_locations[0], *path).read_text())


def _plain_name(text: str) -> str:
    return text.replace("_", "").lower()


def find_class(section: str, name: str) -> tuple[str, str]:
    """The class behind a YAML's name for it: (its name, its module), for speed_monitor SpeedMonitor.

    Raises:
        UserError: if Composer has none of that name.
    """
    package, ending = GROUPS[section]
    classes = {}
    for node in _tree(package, "__init__.py").body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"composer.{package}."):
            for exported in node.names:
                if _plain_name(exported.name).endswith(ending) and exported.name not in ("Logger", "ComposerScheduler"):
                    classes[_plain_name(exported.name).removesuffix(ending)] = (exported.name, node.module)
    wanted = _plain_name(name).removesuffix(ending)
    if wanted not in classes:
        close = difflib.get_close_matches(wanted, classes, n=1)
        hint = f"; did you mean {classes[close[0]][0]}?" if close else f"; it has {', '.join(sorted(classes))}"
        raise UserError(f"{section}.{name}: Composer has no such thing{hint}")
    return classes[wanted]


def _arguments(class_name: str, path: tuple[str, ...]) -> dict[str, tuple[ast.expr | None, bool]] | None:
    """{argument: (annotation, required)} of a class; None if it takes any (``**kwargs``), or can't be told."""
    for node in ast.walk(_tree(*path)):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    if method.args.kwarg is not None:
                        return None
                    positional, defaults = method.args.args[1:], method.args.defaults
                    required = len(positional) - len(defaults)
                    found = {a.arg: (a.annotation, i < required) for i, a in enumerate(positional)}
                    only = zip(method.args.kwonlyargs, method.args.kw_defaults, strict=True)
                    return found | {a.arg: (a.annotation, default is None) for a, default in only}
            return None if node.bases else {}
    return None


def _accepts(annotation: ast.expr | None) -> set[str] | None:
    """The plain types that an annotation admits; None if it admits something that isn't plain."""
    text = ast.unparse(annotation).replace("Optional[", "Union[None, ") if annotation else ""
    types = {part.strip() for part in text.replace("Union[", "").replace("]", "").replace("|", ",").split(",")}
    types.discard("Time")  # from YAML, a time is a string or an integer
    return types if types and types <= PLAIN.keys() else None


def check(key: str, arguments: dict[str, Any], class_name: str, path: tuple[str, ...]) -> None:
    """Checks names, plain types and presence of what a class of Composer is to be built with.

    Args:
        key: where in the YAML the arguments stand, for errors.
        path: the class's source file, below the package.

    Raises:
        UserError: naming the key, what it got, and what it takes.
    """
    known = _arguments(class_name, path)
    if known is None:
        return
    for name, value in arguments.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; it takes {', '.join(known) or 'nothing'}"
            raise UserError(f"{key}.{name}: {class_name} has no such argument{hint}")
        types = _accepts(known[name][0])
        if types is not None:
            admitted = tuple(PLAIN[t] for t in types) + ((int,) if "float" in types else ())
            if not isinstance(value, admitted) or (isinstance(value, bool) and "bool" not in types):
                raise UserError(f"{key}.{name}: got {value!r}; it takes {' or '.join(sorted(types))}")
    for name, (_, required) in known.items():
        if required and name not in arguments:
            raise UserError(f"{key}.{name}: no value; {class_name} needs one")


def check_group(section: str, name: str, arguments: dict[str, Any]) -> None:
    """`check` for a callback, logger, algorithm or scheduler of Composer's, by its YAML name."""
    choose("section", section, tuple(GROUPS))
    class_name, module = find_class(section, name)
    parts = module.split(".")[1:]
    for path in ((*parts[:-1], f"{parts[-1]}.py"), (*parts, f"{parts[-1]}.py")):  # a module, or a package of that name
        try:
            _tree(*path)
        except FileNotFoundError:
            continue
        check(f"{section}.{name}", arguments, class_name, path)
        return


def check_trainer(arguments: dict[str, Any]) -> None:
    """`check` for the Trainer's own arguments; those that the run's YAML has elsewhere are not asked for."""
    check("trainer", {**arguments, "model": None}, "Trainer", ("trainer", "trainer.py"))


def build(section: str, entries: dict) -> list:
    """The objects of Composer's that a section of the YAML names."""
    built = []
    for name, arguments in entries.items():
        class_name, module = find_class(section, name)
        try:
            built.append(getattr(importlib.import_module(module), class_name)(**(arguments or {})))
        except Exception as error:  # whatever the class thinks of its arguments, or of a package that it misses
            raise ConfigError(f"{section}.{name}: {' '.join(str(error).split())}") from error
    return built
