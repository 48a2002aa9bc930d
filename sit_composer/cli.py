"""What all commands share: option types, and how errors become exit codes. Torch is not imported here."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from sit_composer.choices import Bounds
from sit_composer.errors import INTERRUPTED, USAGE, UserError


def make_parser(prog: str, doc: str | None, **options: Any) -> argparse.ArgumentParser:
    """A parser whose --help begins with a command's docstring, line by line."""
    return argparse.ArgumentParser(
        prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **options
    )


def number(bounds: Bounds) -> Callable[[str], int | float]:
    """The type of an option that takes a number within the bounds."""

    def parse(text: str) -> int | float:
        try:
            value = int(text) if bounds.whole else float(text)
        except ValueError:
            value = None
        if value is None or not bounds.admit(value):
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {bounds}")
        return value

    return parse


def refuse_idle(parser: argparse.ArgumentParser, args: argparse.Namespace, *rules: tuple[str, bool, str]) -> None:
    """Ends the command for an option that was given and has no effect.

    Args:
        rules: names of options, whether they have an effect, and what is said if not: "without --classes".
    """
    for names, has_effect, reason in rules:
        for name in names.split():
            if getattr(args, name) is not None and not has_effect:
                parser.error(f"argument --{name.replace('_', '-')}: has no effect {reason}")


def run_command(
    work: Callable[[], int | None],
    stopped: str = "stopped",
    errors: tuple[type[Exception], ...] = (UserError, OSError),
) -> int:
    """Calls a command's work, and returns its exit code. An error of the user's becomes one line, without a traceback.

    Args:
        work: returns the exit code; None is 0.
        stopped: what is printed after Ctrl-C.
        errors: those of the user.
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


def is_remote(path: str) -> bool:
    """Whether a path is a URI."""
    return "://" in path
