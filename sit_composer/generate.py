"""Latents for labels: how they are drawn, and what that takes. torch is imported only when some are drawn."""

import json
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sit_composer.choices import Sampling
from sit_composer.errors import UserError
from sit_composer.samplers import Counted, sample_ode, sample_sde


@dataclass(frozen=True)
class Work:
    """What some pictures took together."""

    pictures: int = 0
    evaluations: float = 0
    passes: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def means(self) -> dict[str, float]:
        """What a picture took on average, and of how many pictures that is known."""
        means = {name: round(getattr(self, name) / self.pictures, 3) for name in ("evaluations", "passes")}
        means = {name: int(value) if value == int(value) else value for name, value in means.items()}
        return {**means, "counted_pictures": self.pictures}

    @classmethod
    def of_earlier(cls, path: Path, pictures: int) -> "Work":
        """What sampling.json says that the pictures took that are here already; of some it may not be known."""
        said = json.loads(path.read_text())
        known = min(said.get("counted_pictures", 0), pictures)
        return cls(known, known * said.get("evaluations", 0), known * said.get("passes", 0))


def generate(
    guidance: Any, transport: Any, labels: list[int], indices: list[int], sampling: Sampling
) -> tuple[Any, dict[str, int]]:
    """Latents (N, C, H, W) for N labels, and what each took: ``evaluations`` of the field, ``passes`` of networks.

    The noise of the picture with index i comes from a generator of its own, seeded with (sampling.seed, i), so that it
    is the same picture whatever it is batched with. (An adaptive solver's steps do depend on the batch, within its
    tolerances.)
    """
    network = guidance.network
    device = next(network.parameters()).device
    shape = (network.in_channels, network.input_size, network.input_size)
    # numpy's generators, as torch's on the CPU heeds only 32 bits of a seed.
    generators = [np.random.default_rng((sampling.seed, i)) for i in indices]

    def draw() -> torch.Tensor:
        noise = np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators])
        return torch.from_numpy(noise).to(device)

    model, guidance.passes = Counted(guidance), 0
    common = {"sampling_method": sampling.sampling_method, "num_steps": sampling.num_steps}
    y = torch.tensor(labels, device=device)
    if sampling.mode == "ODE":
        try:
            x = sample_ode(transport, model, draw(), atol=sampling.atol, rtol=sampling.rtol, y=y, **common)
        except AssertionError as error:  # torchdiffeq's
            raise UserError(f"the solver gave up ({error}); try a larger --atol or --rtol") from error
    else:
        names = ("diffusion_form", "diffusion_norm", "last_step", "last_step_size")
        sde = {name: getattr(sampling, name) for name in names}
        x = sample_sde(transport, model, draw(), draw=draw, y=y, **sde, **common)
    if not x.isfinite().all():
        raise UserError("the sampler gave NaN or infinite values; try more steps, or a smaller cfg_scale or diffusion")
    return x, {"evaluations": model.evaluations, "passes": guidance.passes}
