"""What all commands share: option types, and how errors become exit codes. Torch is not imported here."""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from sit_composer.choices import Bounds
from sit_composer.errors import INTERRUPTED, USAGE, UserError

CREDENTIALS = "credentials are read from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or from a profile"
ENDPOINT = re.compile(r"https?://([a-z\d.-]+|\[[a-f\d:]+\])(:\d+)?(/\S*)?", re.IGNORECASE)
Errors = tuple[type[Exception], ...]


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


def is_remote(path: str) -> bool:
    """Whether a path is a URI."""
    return "://" in path


def s3_endpoint() -> str | None:
    """The address of the S3 store that the environment names; None for AWS. boto3 knows all names but the first."""
    if os.environ.get("S3_ENDPOINT_URL") == "":
        del os.environ["S3_ENDPOINT_URL"]  # streaming would take it for an address
    for name in ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if url := os.environ.get(name):
            if not ENDPOINT.fullmatch(url):
                given = url.rpartition("@")[2]  # without credentials
                raise UserError(f"{name}: got {given!r}, expected http:// or https://, a host, and perhaps a port")
            return url
    return None
