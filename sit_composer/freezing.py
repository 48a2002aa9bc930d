"""Weights that training leaves as they are, by patterns of their names."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from sit_composer.errors import UserError


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Freezes the parameters whose names match one of the patterns, such as blocks.0.*; `*` matches dots too.

    Frozen weights have no gradient, no optimizer's state and no average. Raises UserError for a pattern that matches
    no parameter, or if nothing is left to train.
    """
    named = dict(network.named_parameters())
    for pattern in patterns:
        found = [name for name in named if fnmatchcase(name, pattern)]
        if not found:
            parts = [".".join(name.split(".")[:n]) + ".*" for name in named for n in range(1, name.count(".") + 1)]
            near = difflib.get_close_matches(pattern, dict.fromkeys([*named, *parts]), n=3, cutoff=0.5)
            known = ", ".join(near or dict.fromkeys(part for part in parts if part.count(".") == 1))
            raise UserError(f"freeze: {pattern} matches no weight of the network, expected a pattern such as {known}")
        for name in found:
            named[name].requires_grad_(False)
    if patterns and not any(p.requires_grad for p in named.values()):
        raise UserError(f"freeze: got {', '.join(patterns)}, expected to leave weights that are trained")
