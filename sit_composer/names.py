"""The names that configs, command lines and code share. Nothing heavy is imported here: a config is checked at once."""

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

EVICTED = 143  # exit code after a SIGTERM, 128 + 15: schedulers take it for "told to end", and start the job again


def choose(name: str, value: object, choices: tuple) -> None:
    """Raises UserError, naming the option, its value and what it takes, unless value is one of the choices."""
    if value not in choices:
        raise UserError(f"{name}: got {value!r}; it takes {', '.join(str(choice) for choice in choices)}")


def variant(name: str) -> dict[str, int]:
    """The SiT arguments behind a name such as ``"SiT-XL/2"``.

    Raises:
        ValueError: if there is no such variant.
    """
    choose("model.name", name, tuple(VARIANTS))
    size, patch = name.removeprefix("SiT-").split("/")
    hidden_size, depth, num_heads = SIZES[size]
    return {"hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, "patch_size": int(patch)}
