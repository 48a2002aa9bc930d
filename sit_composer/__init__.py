"""SiT, trained with MosaicML Composer on streamed MDS shards.

The names below load on first use, so that ``import sit_composer`` is light. None of them imports Composer or streaming.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers can't follow __getattr__
    from sit_composer.checkpoint.load import fetch as fetch
    from sit_composer.checkpoint.load import load_checkpoint as load_checkpoint
    from sit_composer.guidance import Guidance as Guidance
    from sit_composer.likelihood import log_likelihood as log_likelihood
    from sit_composer.samplers import sample_ode as sample_ode
    from sit_composer.samplers import sample_sde as sample_sde
    from sit_composer.sit import SiT as SiT
    from sit_composer.sit import build_sit as build_sit
    from sit_composer.transport import Transport as Transport

PUBLIC = {  # name: its module
    "SiT": "sit", "build_sit": "sit", "Transport": "transport", "Guidance": "guidance", "sample_ode": "samplers",
    "sample_sde": "samplers", "log_likelihood": "likelihood", "load_checkpoint": "checkpoint.load",
    "fetch": "checkpoint.load",
}  # fmt: skip
__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'sit_composer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sit_composer.{PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *PUBLIC]
