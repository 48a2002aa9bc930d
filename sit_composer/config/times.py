"""Times of a run, such as 400000ba, 80ep or 0.1dur: which units work where, checked without Composer.

Composer accepts more than works: no batch here has tokens or iterations, a number without a unit silently means epochs,
and what else can't be fails only once the run has started, or never.
"""

import re

from sit_composer.config.schema import ConfigError

TIME = re.compile(r"(\d+\.?\d*(?:e\+?\d+)?|\.\d+)([a-z]+)", re.I)
EXAMPLES = {
    "ba": "batches (1000ba)", "ep": "epochs (5ep)", "sp": "samples (100000sp)", "sec": "seconds (600sec)",
    "dur": "parts of the run (0.1dur)",
}  # fmt: skip
ANY = ("ba", "ep", "sp", "dur")
UNITS = {  # by the argument's name; those of a scheduler admit ANY, those of other classes only batches and epochs
    "max_duration": ("ba", "ep", "sp"),
    "save_interval": (*ANY, "sec"),
    "eval_interval": (*ANY, "sec"),
    "update_interval": ("ba", "ep"),  # SWA's, which has strings for times
    "swa_start": ("ep", "dur"),
    "swa_end": ("ep", "dur"),
}
FROM_ZERO = ("t_warmup", "milestones", "patience")


def parse_time(value: object) -> tuple[float, str]:
    """A time's number and unit; (0, "") if it is none."""
    match = TIME.fullmatch(str(value))
    return (float(match[1]), match[2].lower()) if match else (0, "")


def check_time(key: str, value: object, units: tuple[str, ...]) -> None:
    """Raises ConfigError, naming the key, unless the value is a time that works there."""
    number, unit = parse_time(value)
    zero = key.rpartition(".")[2] in FROM_ZERO
    if unit not in units or (unit != "dur" and number % 1) or (number == 0 and not zero):
        *first, last = (EXAMPLES[unit] for unit in units)
        above = "" if zero else " above 0"
        raise ConfigError(f"{key}: got {value!r}, expected a time{above} in whole {', '.join(first)} or {last}")
