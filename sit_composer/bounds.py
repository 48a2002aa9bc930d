"""What an option admits, as numbers or as names, and how a value that it doesn't admit is refused."""

import difflib
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from sit_composer.errors import UserError


@dataclass(frozen=True)
class Bounds:
    """The finite numbers that an option admits."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False  # least itself is excluded
    below: bool = False  # most itself is excluded
    whole: bool = False
    word: str | None = None  # that is admitted too

    def admit(self, value: float | str) -> bool:
        """Whether the value is within the bounds."""
        if isinstance(value, str):
            return value == self.word
        if not math.isfinite(value) or (self.whole and value != int(value)):
            return False
        excluded = (self.above and value == self.least) or (self.below and value == self.most)
        return self.least <= value <= self.most and not excluded

    def check(self, name: str, value: float | str) -> None:
        """Raises UserError, naming the option, its value and the bounds, unless the value is within them."""
        if not self.admit(value):
            raise UserError(f"{name}: got {value}, expected {self}")

    def __str__(self) -> str:
        return self._numbers() + (f", or {self.word}" if self.word else "")

    def _numbers(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if not math.isfinite(self.least):
            return kind
        if not math.isfinite(self.most):
            return f"{kind} above {self.least:g}" if self.above else f"{kind} of at least {self.least:g}"
        left, right = "(" if self.above else "[", ")" if self.below else "]"
        return f"{kind} in {left}{self.least:.10g}, {self.most:.10g}{right}"


def closest(name: object, known: Iterable[object]) -> str | None:
    """The known name that a mistyped one is likely to mean, if any."""
    names = {str(one).lower(): str(one) for one in known}
    return next((names[one] for one in difflib.get_close_matches(str(name).lower(), names, n=1)), None)


def choose(name: str, value: object, choices: Collection[object]) -> None:
    """Raises UserError, naming the option, its value and what is expected, unless the value is one of the choices."""
    if value not in tuple(choices):
        meant = f"; did you mean {close}?" if (close := closest(value, choices)) else ""
        raise UserError(f"{name}: got {value!r}, expected {', '.join(str(choice) for choice in choices)}{meant}")
