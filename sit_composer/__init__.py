"""SiT, trained with MosaicML Composer on streamed MDS shards.

The names below load on first use, so that ``import sit_composer`` is light. None of them imports Composer or streaming.
"""

import importlib
from typing import Any

PUBLIC = {  # name: its module
    "SiT": "sit",
    "build_sit": "sit",
    "Transport": "transport",
    "Guidance": "guidance",
    "sample_ode": "samplers",
    "sample_sde": "samplers",
    "log_likelihood": "likelihood",
    "load_checkpoint": "checkpoint.load",
    "fetch": "checkpoint.load",
}
__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'sit_composer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sit_composer.{PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *PUBLIC]
