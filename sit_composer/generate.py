"""Latents for labels: how they are generated, and what that costs."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sit_composer.choices import Sampling
from sit_composer.errors import UserError
from sit_composer.guidance import Guidance
from sit_composer.samplers import Counted, sample_ode, sample_sde
from sit_composer.transport import Transport


def earlier_work(path: Path, images: int) -> Counter[str]:
    """What the images that are there already cost together, as far as sampling.json has it."""
    settings = json.loads(path.read_text())
    known = min(settings.get("counted_pictures", 0), images)
    return Counter(images=known, **{name: known * settings.get(name, 0) for name in ("evaluations", "passes")})


def mean_work(work: Counter[str]) -> dict[str, float]:
    """The mean cost per image, and the number of images for which it is known."""
    means = {name: round(work[name] / work["images"], 3) for name in ("evaluations", "passes")}
    means = {name: int(value) if value == int(value) else value for name, value in means.items()}
    return {**means, "counted_pictures": work["images"]}


def generate(
    guidance: Guidance,
    transport: Transport,
    labels: list[int],
    indices: list[int],
    sampling: Sampling,
    watch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, dict[str, int]]:
    """Latents (N, C, H, W) for N labels, and the cost of each: ``evaluations`` of the field, ``passes`` of networks.

    The noise of image i comes from a generator seeded with (sampling.seed, i), so that an image does not depend on the
    others in its batch. (The steps of an adaptive solver do, within its tolerances.) Raises a UserError if the sampler
    gives up, or gives values that are not finite.

    ``watch`` is called after each evaluation, in the solver's order, with the state (N, C, H, W), its time (N,) and the
    guided prediction (N, C, H, W). It must not change them, and may raise to stop.
    """
    network = guidance.network
    device = next(network.parameters()).device
    shape = (network.in_channels, network.input_size, network.input_size)
    # NumPy's generators, as torch's on the CPU uses only 32 bits of a seed.
    generators = [np.random.default_rng((sampling.seed, i)) for i in indices]

    def draw() -> Tensor:
        noise = torch.from_numpy(np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators]))
        # A GPU's copy from pinned memory doesn't wait for the steps before.
        return noise.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else noise.to(device)

    guidance.passes = 0
    with torch.no_grad():
        model, y = Counted(guidance, watch), guidance.embed(torch.tensor(labels, device=device))
    common = {"sampling_method": sampling.sampling_method, "num_steps": sampling.num_steps, "y": y}
    common["time_shift"] = sampling.time_shift
    if sampling.mode == "ODE":
        x = sample_ode(transport, model, draw(), atol=sampling.atol, rtol=sampling.rtol, **common)
    else:
        sde = {k: getattr(sampling, k) for k in ("diffusion_form", "diffusion_norm", "last_step", "last_step_size")}
        x = sample_sde(transport, model, draw(), draw=draw, **sde, **common)
    if not x.isfinite().all():
        advice = "try more steps, or a smaller cfg_scale or diffusion"
        raise UserError(f"sampling_method: {sampling.sampling_method} gave NaN or infinite values; {advice}")
    return x, {"evaluations": model.evaluations, "passes": guidance.passes}
