"""Lets the training step be imported on a machine without Composer.

`ComposerSiT` and `EMAWeights` compute with torch alone; of Composer they have only base classes and types, for which
empty ones stand in here. Whatever else of Composer the step came to use would be missed at once.
"""

import sys
from importlib import util
from types import ModuleType

import torch

STAND_INS = {
    "composer": (),
    "composer.models": ("ComposerModel",),
    "composer.algorithms": ("EMA",),
    "composer.core": ("Algorithm", "Callback", "Event", "State"),
    "composer.loggers": ("Logger",),
    "torchmetrics": ("MeanMetric", "Metric"),
}


def prepare() -> bool:
    """Whether Composer is there. If not, its classes are empty ones from now on; a model is an `nn.Module`."""
    there = util.find_spec("composer") is not None
    for name, classes in STAND_INS.items():
        if name not in sys.modules and (not there if name.startswith("composer") else util.find_spec(name) is None):
            module = ModuleType(name)
            bases = {cls: (torch.nn.Module,) if cls == "ComposerModel" else () for cls in classes}
            vars(module).update({cls: type(cls, base, {}) for cls, base in bases.items()})
            sys.modules[name] = module
    return there
