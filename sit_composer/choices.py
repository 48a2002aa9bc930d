"""Every option's names, bounds and shared defaults. Config, --help, constructors and commands read them here.

Torch is not imported, so that a command can refuse a wrong value at once.
"""

import math
import os
import re
from dataclasses import dataclass
from typing import Any

from sit_composer.bounds import Bounds, choose
from sit_composer.errors import UserError

COUNT = Bounds(1, whole=True)
FROM_ZERO = Bounds(0, whole=True)
FINITE = Bounds()
POSITIVE = Bounds(0, above=True)
NOT_NEGATIVE = Bounds(0)
BELOW_ONE = Bounds(0, 1, below=True)
UNIT = Bounds(0, 1)
INSIDE_UNIT = Bounds(0, 1, above=True, below=True)
EPS = Bounds(0, 0.5, below=True)
T_EPS = Bounds(0, 0.5, above=True, below=True)
SHIFT = Bounds(0, above=True, word="auto")
TORCH_SEED = Bounds(0, 2**32 - 1, whole=True)
TIME_POINTS = Bounds(2, whole=True)  # of a solver, both ends included

# Name: (hidden_size, depth, num_heads), from table 1 of DiT (arXiv 2212.09748).
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
VARIANTS = [f"SiT-{size}/{patch}" for size in SIZES for patch in (2, 4, 8)]
VARIANTS += [f"LightningDiT-{size}/1" for size in ("B", "L", "XL")]  # the block of arXiv 2501.01423, as released
# The options of newer blocks, and what each is when it is off. A record doesn't name those that are off.
BLOCKS: dict[str, bool | int] = {
    "qk_norm": False, "rms_norm": False, "swiglu": False, "rotary": False,
    "class_tokens": 0, "class_tokens_start": 0, "shared_adaln": False,
}  # fmt: skip
LIGHTNING: dict[str, Any] = {"learn_sigma": False, "rms_norm": True, "swiglu": True, "rotary": True}


def variant(name: str) -> dict[str, Any]:
    """The SiT arguments behind a name such as ``"SiT-XL/2"``."""
    choose("model.name", name, VARIANTS)
    family, size, patch = re.split("[-/]", name)
    hidden_size, depth, num_heads = SIZES[size]
    sizes = {"hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, "patch_size": int(patch)}
    return sizes | (LIGHTNING if family == "LightningDiT" else {})


def check_sizes(hidden_size: int, num_heads: int, input_size: int, patch_size: int, prefix: str = "") -> None:
    """Raises UserError unless these sizes of a SiT divide each other as they must."""
    sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "input_size": input_size, "patch_size": patch_size}
    for name, size in sizes.items():
        COUNT.check(prefix + name, size)
    if hidden_size % num_heads or hidden_size % 4:
        multiple = f"a multiple of num_heads ({num_heads}), and of 4 for the sin-cos positions"
        raise UserError(f"{prefix}hidden_size: got {hidden_size}, expected {multiple}")
    if input_size % patch_size:
        raise UserError(f"{prefix}input_size: got {input_size}, expected a multiple of patch_size ({patch_size})")


def check_blocks(
    hidden_size: int,
    depth: int,
    num_heads: int,
    rotary: bool,
    class_tokens: int,
    class_tokens_start: int,
    prefix: str = "",
) -> None:
    """Raises UserError unless a SiT of these sizes can have these options of its blocks."""
    if rotary and hidden_size // num_heads % 4:
        what = f"got {num_heads}, whose heads are {hidden_size // num_heads} wide"
        raise UserError(f"{prefix}num_heads: {what}, expected a width that is a multiple of 4, for rotary")
    FROM_ZERO.check(f"{prefix}class_tokens", class_tokens)
    if class_tokens == 0 and class_tokens_start != 0:
        raise UserError(f"{prefix}class_tokens_start: got {class_tokens_start}, expected 0, as class_tokens is 0")
    if class_tokens and not 0 <= class_tokens_start < depth:
        raise UserError(
            f"{prefix}class_tokens_start: got {class_tokens_start}, expected one of the {depth} blocks, from 0"
        )


@dataclass(frozen=True)
class PathFacts:
    """A path's poles; its formulas are in `interpolant`. Noise is at t = 0, data at t = 1."""

    pole_at_noise: bool  # α = 0 at t = 0, so that what divides by α has a pole there
    pole_at_data: bool = False  # dσ/dt is infinite at t = 1, so that the velocity has a pole there, and no path beyond
    train_eps: float = 1e-3  # how far training times stay from a pole, unless a value is given; as released
    sample_eps: float = 1e-3  # the same for sampling


PATHS = {
    "Linear": PathFacts(pole_at_noise=True),
    "GVP": PathFacts(pole_at_noise=True),
    "VP": PathFacts(pole_at_noise=False, pole_at_data=True, train_eps=1e-5),
}
PRECISIONS = ("auto", "fp32", "bf16")  # on every device; auto is bf16 where the device has it
GPU_PRECISIONS = ("amp_bf16", "amp_fp16")  # Composer's names
OPTIMIZERS = ("adamw", "muon")
NEWTON_SCHULZ = 5  # iterations of Muon's orthogonalization
ON_NAN = ("stop", "skip", "rollback")
PREDICTIONS = ("velocity", "noise", "score", "x")
OVER_ALPHA = ("noise", "score")  # predictions whose velocity divides by α, which is 0 at the pole at the noise
ALIGNMENTS = {"sra": 0.2, "repa": 0.5}  # and the weight of each, as published
TRAINING_ONLY = "projector."  # the names of weights that averages and exports lack
PROJECTORS = ("mlp", "conv")
LOSS_WEIGHTS = (None, "velocity", "likelihood")
TIME_SAMPLINGS = ("uniform", "logit-normal")
DIFFUSION_FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")
LAST_STEPS = (None, "Mean", "Tweedie", "Euler")


def check_poles(transport: Any, prefix: str = "") -> None:
    """Raises UserError for an eps of 0, of a Transport or its config, with which the times would reach a pole.

    Training draws times from [0, 1): only the pole at t = 0 matters, which the weights of a noise or score error have.
    Sampling evaluates both ends: a velocity computed from noise or score has a pole at t = 0.
    """
    path, converted = PATHS[transport.path_type], transport.prediction in OVER_ALPHA
    weighted = converted and transport.loss_weight is not None
    what = f"expected a number above 0, as {transport.path_type} with prediction {transport.prediction}"
    if transport.train_eps == 0 and weighted and path.pole_at_noise:
        raise UserError(f"{prefix}train_eps: got 0, {what} and loss_weight {transport.loss_weight} has a pole at t = 0")
    if transport.sample_eps == 0 and (converted or path.pole_at_data):
        raise UserError(f"{prefix}sample_eps: got 0, {what} has a pole at t = {int(path.pole_at_data)}")


def check_objective(transport: Any, prefix: str = "") -> None:
    """Raises UserError for a loss weight, of a Transport or its config, that its prediction doesn't have."""
    if transport.prediction == "x" and transport.loss_weight == "likelihood":
        raise UserError(f"{prefix}loss_weight: got likelihood, expected None or velocity with prediction x")


def check_shift(transport: Any, prefix: str = "") -> None:
    """Raises UserError for an eps beside a time shift of auto: it would move the ends, between which σ/α is shifted."""
    for name in ("train_eps", "sample_eps") if transport.time_shift == "auto" else ():
        if (eps := getattr(transport, name)) is not None:
            raise UserError(f"{prefix}{name}: got {eps}, expected null beside {prefix}time_shift=auto")


def dimension_shift(dims: int) -> float:
    """√(dims / 4096), the time shift for data of so many dimensions (RAE, arXiv 2510.11690)."""
    return math.sqrt(dims / 4096)


SDE_METHODS = ("Euler", "Heun")
# torchdiffeq's solvers, with heun as a name for heun2. Two are left out: fehlberg2 gives wrong answers (0.408 for e⁻¹
# in 0.2.5), and the wrapper around SciPy's solvers takes other options.
FIXED_STEP_METHODS = ("euler", "heun", "heun2", "heun3", "midpoint", "rk4", "explicit_adams", "implicit_adams")
ADAPTIVE_METHODS = ("dopri5", "dopri8", "bosh3", "adaptive_heun")
ODE_METHODS = FIXED_STEP_METHODS + ADAPTIVE_METHODS


def check_tolerances(atol: float, rtol: float, prefix: str = "") -> None:
    """Raises UserError for tolerances below 0, or for two zeros, with which an adaptive solver would never end."""
    NOT_NEGATIVE.check(f"{prefix}atol", atol)
    NOT_NEGATIVE.check(f"{prefix}rtol", rtol)
    if atol == rtol == 0:
        raise UserError(f"{prefix}atol: got 0, and {prefix}rtol too, expected a number above 0 for one of them")


def check_interval(interval: tuple[float, float], name: str) -> None:
    """Raises UserError unless guidance's two times are in order."""
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise UserError(f"{name}: got {interval[0]:g} to {interval[1]:g}, expected two times in [0, 1], in order")


POWER = "power"  # in front of the std, the name of a power function's average; that of an exponential one is its decay
POWER_STD = Bounds(0, 12**-0.5, above=True, below=True)  # relative to training so far; at 1/√12 all batches count alike
AVERAGE = re.compile(rf"({POWER})?\d(\.\d+)?(e-\d+)?")
WEIGHTS = re.compile(rf"training|ema(:{AVERAGE.pattern})?")  # of a checkpoint
WEIGHTS_HELP = "ema, training, or one of several averages, such as ema:0.999 or ema:power0.05 (ema: the first)"


def check_weights(option: str, weights: str) -> None:
    """Raises UserError unless this can be the name of a checkpoint's weights."""
    if not WEIGHTS.fullmatch(weights):
        raise UserError(f"{option}: got {weights!r}, expected {WEIGHTS_HELP.partition(' (')[0]}")


TEACHERS = ("timm", "transformers")  # libraries that have vision transformers


def teacher_name(name: str, option: str = "alignment.teacher") -> str:
    """A teacher's name, such as transformers:facebook/dinov2-base; a folder's in full. UserError for no such name."""
    library, _, model = name.partition(":")
    if library not in TEACHERS or not model:
        raise UserError(f"{option}: got {name!r}, expected timm:NAME or transformers:NAME, of a model or its folder")
    folder = os.path.expanduser(model)
    return f"{library}:{os.path.realpath(folder)}" if os.path.isdir(folder) else name


def dinov2_file(features: str) -> str | None:
    """The file in ``dinov2:FILE``, "" for ``dinov2``, or None for other features."""
    name, _, file = features.partition(":")
    return os.path.expanduser(file) if name == "dinov2" else None


def check_features(option: str, features: str) -> None:
    """Raises UserError unless the features are of an extractor's name, or of a file that exists."""
    file = dinov2_file(features)
    if features == "inception" or file == "":
        return
    path = features if file is None else file
    if not os.path.isfile(path):
        raise UserError(f"{option}: {path} is no file; expected inception, dinov2, dinov2:FILE or a TorchScript file")


LATENT_STD = Bounds(0.3, 3)  # plausible standard deviations of training's latents
LATENT_MEAN = Bounds(-1.5, 1.5)


@dataclass(frozen=True)
class Metric:
    """What a metric of evaluation needs, and how a table shows it."""

    heading: str
    output: str  # of the extractor: features, spatial, logits, or second, the features of a second extractor
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
    "fd": Metric("FID", "second", "images", least=2),  # of two extractors only
}


@dataclass(frozen=True)
class Sampling:
    """How images are generated: the part of the settings that `generate` takes."""

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
    time_shift: float = 1.0


EXACT_DIMS = 4096  # an exact trace takes one backward pass per dimension; with more, it is refused


@dataclass(frozen=True)
class Solve:
    """How log p is computed. An option that the solver doesn't use is None."""

    sampling_method: str = "dopri5"
    num_steps: int | None = None  # of a fixed-step solver
    atol: float | None = 1e-5  # of an adaptive one
    rtol: float | None = 1e-5
    probes: int | None = 1
    exact: bool = False  # the exact trace instead of probes
    seed: int = 0
