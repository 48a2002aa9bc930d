"""log p(x) by the probability-flow ODE, integrated from data back to noise (FFJORD, arXiv 1810.01367, eqs. 3 and 7).

Along dx = v dt the density changes by d log p / dt = -∇·v, so that log p(x₁) = log N(x₀) - ∫₀¹ ∇·v dt.
"""

import math

import torch
from torch import Tensor

from sit_composer.choices import COUNT
from sit_composer.errors import UserError
from sit_composer.samplers import check_solver, in_float32, integrate
from sit_composer.transport import Model, Transport


@torch.no_grad()
def log_likelihood(
    tr: Transport,
    model: Model,
    x: Tensor,
    *,
    sampling_method: str = "dopri5",
    num_steps: int = 50,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    probes: int = 1,
    exact: bool = False,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    **model_kwargs,
) -> Tensor:
    """The log density of data x (N, …), in nats: (N,).

    p is the density at the end of `Transport.interval`: of the data or, where the field has a pole at the data, of the
    data with the path's noise at that time (1 - 1e-3, unless sample_eps is given).

    Args:
        sampling_method, num_steps, atol, rtol: the solver, as for `sample_ode`; a UserError if it gives up.
        probes: the number of vectors ε of ±1 over which Hutchinson's estimate ∇·v ≈ εᵀ(∂v/∂x)ε is averaged. As in
            FFJORD, they are drawn once per solve: an adaptive solver would take new ones at each call for stiffness.
        exact: the exact trace instead, at one backward pass per dimension.
        generator: draws the probes, on the CPU; None is torch's own.
        noise: the probes themselves, (probes, N, …), if the caller draws them.
    """
    check_solver(sampling_method, num_steps, atol, rtol)
    COUNT.check("probes", probes)
    t0, t1 = tr.interval(eval=True)
    model, x = in_float32(model, x)
    times = torch.linspace(t1, t0, num_steps, device=x.device, dtype=x.dtype)
    shape = (probes, *x.shape)
    if noise is None:
        device = generator.device if generator else "cpu"
        noise = torch.randint(0, 2, shape, generator=generator, device=device) * 2 - 1
    elif noise.shape != shape:
        raise UserError(f"noise: got {tuple(noise.shape)}, expected {shape}")
    noise = noise.to(x.device, x.dtype)  # (probes, N, …)

    def drift(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            v = tr.velocity(model, x, t.expand(len(x)), **model_kwargs)
            if not v.requires_grad:  # the field doesn't depend on x
                return v, x.new_zeros(len(x))
            divergence = _trace(v, x) if exact else _hutchinson(v, x, noise)
        return v.detach(), divergence

    start = (x, x.new_zeros(len(x)))
    states, changes = integrate(drift, start, times, sampling_method, atol, rtol, overstep=False)
    prior = -0.5 * (states[-1].square() + math.log(2 * math.pi)).flatten(1).sum(1)
    return prior + changes[-1]  # ∫ ∇·v dt from t1 down to t0


def _hutchinson(v: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    """The mean of εᵀ(∂v/∂x)ε over the probes ε of noise (probes, N, …): (N,)."""
    products = (torch.autograd.grad(v, x, e, retain_graph=i + 1 < len(noise))[0] * e for i, e in enumerate(noise))
    return torch.stack([product.flatten(1).sum(1) for product in products]).mean(0)


def _trace(v: Tensor, x: Tensor) -> Tensor:
    """∇·v, one dimension after another: (N,)."""
    flat = v.flatten(1)  # (N, D)
    rows = (torch.autograd.grad(flat[:, d].sum(), x, retain_graph=True)[0].flatten(1) for d in range(flat.shape[1]))
    return torch.stack([row[:, d] for d, row in enumerate(rows)]).sum(0)


def dequantize(levels: Tensor, noise: Tensor) -> Tensor:
    """8-bit levels (N, C, H, W) with noise u of that shape, uniform on [0, 1), as images: (l + u - ½) / 127.5 - 1.

    Each level is spread over the interval of width 1 around its value in training (`autoencoder.from_uint8`). As in
    arXiv 1511.01844, section 3.1, the density's integral over the interval is the level's probability, and by Jensen's
    inequality the mean of log p over u is at most that probability's logarithm: the bits are an upper bound.
    """
    return (levels + noise - 0.5) / 127.5 - 1


def bits_per_dim(log_p: Tensor, dims: int, levels: float = 127.5) -> Tensor:
    """Bits per dimension (N,) of 8-bit images, from a density over [-1, 1]: p(level) = p(x) / levels per dimension.

    Args:
        log_p: nats of each image, (N,).
        dims: dimensions of an image.
        levels: levels per unit of x; 1 for the density itself, as of latents.
    """
    return (math.log(levels) - log_p / dims) / math.log(2)
