"""Compiles the network's blocks by `torch.compile`, which takes seconds to minutes in a run's first step.

All blocks share one graph, so a deep network compiles as fast as a shallow one.
"""

import os
import shutil
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sit_composer.config.schema import ConfigError
from sit_composer.errors import first_line
from sit_composer.sit import SiT, SiTBlock


def find_backend(compile: str, device: str) -> str | None:
    """The backend that a config's ``compile`` names, None for false. A ConfigError names what it lacks here."""
    backend = {"false": None, "true": "inductor"}.get(compile.lower(), compile)
    if backend is None:
        return None
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        usual = ", ".join(torch.compiler.list_backends())
        raise ConfigError(f"compile: got {compile}, expected true, false or a backend: {usual}")
    if backend == "inductor":
        variable, *names = ("CXX", "g++", "clang++") if device == "cpu" else ("CC", "gcc", "clang")
        names = [os.environ[variable].split()[0]] if os.environ.get(variable, "").strip() else names
        if not any(map(shutil.which, names)):
            what = f"needs a compiler, {' or '.join(names)}; install one, or set {variable}"
            raise ConfigError(f"compile: got {compile}, which {what}, or use compile=false")
        if device == "cuda" and find_spec("triton") is None:
            what = "needs the package triton; run pip install triton"
            raise ConfigError(f"compile: got {compile}, which {what}, or use compile=false")
    place = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
    try:
        torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.zeros(2, device=place))
    except Exception as error:  # of any kind: a backend's package is missing, a compiler fails, a cache isn't writable
        cause = getattr(error, "inner_exception", error)
        said = [line.strip() for line in str(cause).splitlines() if "error:" in line] or [first_line(cause)]
        raise ConfigError(f"compile: got {compile}, which fails here: {said[0]}; use compile=false") from error
    return backend


def compile_blocks(network: SiT, backend: str) -> None:
    """Compiles what each block computes in training; evaluation and sampling, whose batches vary, stay eager.

    Only the blocks' forward methods are replaced: hooks (FSDP2's) stay outside the graphs, and names stay.
    """
    for block in network.blocks:
        compiled = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)
        block.forward = partial(_forward, block, block.forward, compiled)


def _forward(block: SiTBlock, eager: Callable, compiled: Callable, *args: Any) -> Tensor:
    return (compiled if block.training else eager)(*args)
