"""Imports Composer and streaming without the packages that they load along, and that nothing here uses.

Composer loads torchmetrics, whose metrics of text, audio and plots load transformers' models, scipy, scikit-learn,
pandas and matplotlib; streaming's data sets of text and images load transformers' models again, and torchvision's.
These take most of the import time. They are optional: while Composer and streaming load, this module hides them, so
that each library takes its own branch for "not installed".
"""

import gc
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import importlib_metadata

# The backport takes the search for installed packages over from Python's own finder, so it must come first.
assert importlib_metadata.MetadataPathFinder in map(type, sys.meta_path)
# Modules that aren't to be found, unless they are imported already: Composer and streaming do without.
HIDDEN = ("matplotlib", "pandas", "paramiko", "scipy", "sklearn", "transformers")
PACKAGES = {"sklearn": "scikit-learn"}  # that have another name than their module
# Library: the modules to import, and those that an empty one with these classes stands in for meanwhile.
LIBRARIES: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "torch": (("torch",), {}),
    "composer": (("composer", "composer.algorithms"), {"mcli": ()}),  # the client of MosaicML's platform
    "streaming": (
        ("streaming",),
        {
            "streaming.multimodal": (),
            "streaming.text": (),
            "streaming.vision": (),
            "transformers.feature_extraction_utils": ("BatchFeature",),  # it only asks whether a batch is one
            "transformers.tokenization_utils_base": ("BatchEncoding",),
        },
    ),
}


def load(*libraries: str) -> None:
    """Imports libraries, for later imports to find; without effect on one that is imported already."""
    gc.disable()  # nothing of what imports make is garbage
    for modules, replaced in map(LIBRARIES.__getitem__, libraries):
        empty = {name: ModuleType(name) for name in replaced if name not in sys.modules}
        for name, module in empty.items():
            vars(module).update({cls: type(cls, (), {}) for cls in replaced[name]})
        sys.modules.update(empty)
        try:
            hidden = [name for name in HIDDEN if name not in sys.modules]
            with hide((*hidden, *(PACKAGES.get(name, name) for name in hidden))):
                for name in modules:
                    import_module(name)
        finally:
            for name in empty:  # whoever wants the real one can import it
                del sys.modules[name]
    if "composer" in libraries:
        sys.modules["composer.utils.collect_env"].get_cpu_model = cpu_model  # type: ignore[attr-defined]
    gc.enable()


def cpu_model() -> str:
    """The processor's name, as checkpoints hold it. Composer starts a process for it that computes for a second."""
    with suppress(OSError):
        if match := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()):
            return match[1]
    return platform.processor() or "CPU"


@contextmanager
def hide(names: tuple[str, ...]) -> Iterator[None]:
    """Within it, the modules and packages of these names can't be found."""
    before = sys.meta_path[:]
    sys.meta_path[:] = [Blind(finder, names) for finder in before]
    try:
        yield
    finally:
        sys.meta_path[:] = before


class Blind:
    """A finder of `sys.meta_path` that doesn't find some names."""

    def __init__(self, finder: Any, names: tuple[str, ...]):
        self.finder = finder
        self.names = names

    def find_spec(self, name: str, *where: Any) -> Any:
        return None if name.partition(".")[0] in self.names else self.finder.find_spec(name, *where)

    def __getattr__(self, attribute: str) -> Any:
        found = getattr(self.finder, attribute)
        if attribute != "find_distributions":
            return found
        return lambda context: [] if context.name in self.names else found(context)
