"""The names that configs, command lines and code share. Nothing heavy is imported here: a config is checked at once."""

import math
from dataclasses import dataclass

from sit_composer.errors import UserError

SIZES = {  # name: (hidden_size, depth, num_heads), table 1 of DiT (arXiv 2212.09748)
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
VARIANTS = [f"SiT-{size}/{patch}" for size in SIZES for patch in (2, 4, 8)]
PATHS = ("Linear", "GVP", "VP")
PREDICTIONS = ("velocity", "noise", "score")
LOSS_WEIGHTS = (None, "velocity", "likelihood")
TIME_SAMPLINGS = ("uniform", "logit-normal")
DIFFUSION_FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")
LAST_STEPS = (None, "Mean", "Tweedie", "Euler")
SDE_METHODS = ("Euler", "Heun")
# torchdiffeq's solvers, and heun for its heun2. Two are left out: its fehlberg2 gives wrong answers (0.408 for e⁻¹ in
# 0.2.5), and its wrapper round scipy's wants options of its own.
FIXED_STEP_METHODS = ("euler", "heun", "heun2", "heun3", "midpoint", "rk4", "explicit_adams", "implicit_adams")
ADAPTIVE_METHODS = ("dopri5", "dopri8", "bosh3", "adaptive_heun")
ODE_METHODS = FIXED_STEP_METHODS + ADAPTIVE_METHODS


@dataclass(frozen=True)
class Bounds:
    """The finite numbers that an option admits."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False  # least itself is excluded
    below: bool = False  # most itself is excluded
    whole: bool = False

    def admit(self, value: float) -> bool:
        """Whether the value is within the bounds."""
        if not math.isfinite(value) or (self.whole and value != int(value)):
            return False
        enough = value > self.least if self.above else value >= self.least
        return enough and (value < self.most if self.below else value <= self.most)

    def check(self, name: str, value: float) -> None:
        """Raises UserError, naming the option, its value and what is expected, unless the value is within the bounds."""
        if not self.admit(value):
            raise UserError(f"{name}: got {value}, expected {self}")

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if math.isfinite(self.least) and math.isfinite(self.most):
            return (
                f"{kind} in {'(' if self.above else '['}{self.least:.10g}, {self.most:.10g}{')' if self.below else ']'}"
            )
        if math.isfinite(self.least):
            return f"{kind} above {self.least:g}" if self.above else f"{kind} of at least {self.least:g}"
        return kind


COUNT = Bounds(1, whole=True)
FROM_ZERO = Bounds(0, whole=True)
POSITIVE = Bounds(0, above=True)
NOT_NEGATIVE = Bounds(0)
EPS = Bounds(0, 0.5, below=True)
TIME_POINTS = Bounds(2, whole=True)  # of a solver, both ends included


def choose(name: str, value: object, choices: tuple) -> None:
    """Raises UserError, naming the option, its value and what is expected, unless the value is one of the choices."""
    if value not in choices:
        raise UserError(f"{name}: got {value!r}, expected {', '.join(str(choice) for choice in choices)}")


def variant(name: str) -> dict[str, int]:
    """The SiT arguments behind a name such as ``"SiT-XL/2"``.

    Raises:
        ValueError: if there is no such variant.
    """
    choose("model.name", name, tuple(VARIANTS))
    size, patch = name.removeprefix("SiT-").split("/")
    hidden_size, depth, num_heads = SIZES[size]
    return {"hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, "patch_size": int(patch)}


WEIGHTS = ("ema", "training")  # of a checkpoint


@dataclass(frozen=True)
class Metric:
    """What a metric of evaluation needs, and how a table shows it."""

    heading: str
    output: str  # of the extractor: features, spatial or logits
    reference: str | None  # what it needs of the reference: statistics, images or nothing
    least: int  # images per set
    digits: str = ".2f"
    factor: int = 1  # of the value in the table


METRICS = {
    "fid": Metric("FID", "features", "statistics", least=2),
    "sfid": Metric("sFID", "spatial", "statistics", least=2),
    "is": Metric("IS", "logits", None, least=20),
    "precision": Metric("P", "features", "images", least=4, digits=".3f"),
    "recall": Metric("R", "features", "images", least=4, digits=".3f"),
    "kid": Metric("KID × 10³", "features", "images", least=2, digits=".3f", factor=1000),
}


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: the part of the settings that `generate` takes."""

    mode: str = "ODE"
    sampling_method: str = "dopri5"
    num_steps: int = 50
    cfg_scale: float = 1.0
    cfg_channels: int | None = None
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    atol: float = 1e-6
    rtol: float = 1e-3
    diffusion_form: str = "sigma"
    diffusion_norm: float = 1.0
    last_step: str | None = "Mean"
    last_step_size: float = 0.04


IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # other decoders of PIL are not for unknown files


EXACT_DIMS = 4096  # the most for which an evaluation of the field may take a backward pass a dimension


@dataclass(frozen=True)
class Solve:
    """How log p is taken. What the solver doesn't use is None."""

    sampling_method: str = "dopri5"
    num_steps: int | None = None  # of a fixed-step solver
    atol: float | None = 1e-5  # of an adaptive one
    rtol: float | None = 1e-5
    probes: int | None = 1
    exact: bool = False  # the whole trace instead of probes
    seed: int = 0
