"""What all commands share. Torch is not imported here."""

import os


def say(message: str) -> None:
    """Prints a line, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def is_remote(path: str) -> bool:
    """Whether a path is a URI."""
    return "://" in path
