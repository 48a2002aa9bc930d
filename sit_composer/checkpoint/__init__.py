"""Checkpoints, read without running code in them."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """`load_checkpoint`, whose module is heavy, loads on first use."""
    if name != "load_checkpoint":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("sit_composer.checkpoint.load").load_checkpoint
