"""log p(x) by the probability-flow ODE, run from data back to noise (arXiv 1810.01367, eqs. 3 and 7).

Along dx = v dt the density changes by d log p / dt = -∇·v, so that log p(x₁) = log N(x₀) - ∫₀¹ ∇·v dt.
"""

import math

import torch
from torch import Tensor
from torchdiffeq import odeint

from sit_composer.choices import ODE_METHODS, choose
from sit_composer.errors import UserError
from sit_composer.samplers import check_steps, check_tolerances, in_float32, solver
from sit_composer.transport import Transport


@torch.no_grad()
def log_likelihood(
    tr: Transport,
    model,
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

    It is that of p at the end of `Transport.interval`: of data itself, or, where the field has a pole at the data, of
    data with the path's noise of that last time (1e-3, unless sample_eps says otherwise).

    Args:
        sampling_method, num_steps, atol, rtol: the solver, as for `sample_ode`.
        probes: Hutchinson's estimate ∇·v ≈ εᵀ(∂v/∂x)ε is averaged over so many ε of ±1. They are drawn once a solve, as
            FFJORD does: with a new one at each call, an adaptive solver would take the noise for stiffness.
        exact: the whole trace instead, at one backward pass a dimension.
        generator: where the probes come from, on the CPU; None is torch's own.
        noise: the probes themselves, (probes, N, …), if the caller draws them.

    Raises:
        UserError: for an unknown solver, fewer than 2 time points, no tolerance or probe, or noise of another shape.
    """
    choose("sampling_method", sampling_method, ODE_METHODS)
    check_steps(num_steps)
    check_tolerances(atol, rtol)
    if probes < 1:
        raise UserError(f"probes: got {probes}; it takes 1 or more")
    t0, t1 = tr.interval(eval=True)
    model, x = in_float32(model, x)
    times = torch.linspace(t1, t0, num_steps, device=x.device, dtype=x.dtype)
    shape = (probes, *x.shape)
    if noise is None:
        device = generator.device if generator else "cpu"
        noise = torch.randint(0, 2, shape, generator=generator, device=device) * 2 - 1
    elif noise.shape != shape:
        raise UserError(f"noise: got {tuple(noise.shape)}; it takes {shape}")
    noise = noise.to(x.device, x.dtype)  # (probes, N, …)

    def drift(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            v = tr.velocity(model, x, t.expand(len(x)), **model_kwargs)
            if not v.requires_grad:  # a field that doesn't depend on x
                return v, x.new_zeros(len(x))
            divergence = _trace(v, x) if exact else _hutchinson(v, x, noise)
        return v.detach(), divergence

    start = (x, x.new_zeros(len(x)))
    z, change = odeint(drift, start, times, atol=atol, rtol=rtol, **solver(sampling_method, stop_at=times[-1:]))
    z, change = z[-1], change[-1]  # change is ∫ ∇·v from t1 down to t0
    prior = -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    return prior + change


def _hutchinson(v: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    estimates = [
        (torch.autograd.grad(v, x, e, retain_graph=i + 1 < len(noise))[0] * e).flatten(1).sum(1)
        for i, e in enumerate(noise)
    ]
    return torch.stack(estimates).mean(0)  # (N,)


def _trace(v: Tensor, x: Tensor) -> Tensor:
    flat = v.flatten(1)  # (N, D)
    diagonal = [
        torch.autograd.grad(flat[:, d].sum(), x, retain_graph=True)[0].flatten(1)[:, d] for d in range(flat.shape[1])
    ]
    return torch.stack(diagonal).sum(0)  # (N,)


def dequantize(levels: Tensor, noise: Tensor) -> Tensor:
    """8-bit levels (N, C, H, W) with noise u of that shape, uniform on [0, 1), as pictures: (l + u - ½) / 127.5 - 1.

    Each level gets the interval of width 1 about the place where training has it (`autoencoder.from_uint8`). As in
    arXiv 1511.01844, section 3.1, a density's integral over the interval is the probability of the level, and by
    Jensen's inequality the mean of log p over u is not more than its logarithm: the bits are an upper bound.
    """
    return (levels + noise - 0.5) / 127.5 - 1


def bits_per_dim(log_p: Tensor, dims: int, levels: float = 127.5) -> Tensor:
    """Bits a dimension of 8-bit pictures whose density was taken on [-1, 1]: p(level) = p(x) / levels a dimension.

    Args:
        log_p: nats of each picture, (N,).
        dims: dimensions of a picture.
        levels: how many levels a unit of x is; 1 for data whose density is wanted as it is.
    """
    return (math.log(levels) - log_p / dims) / math.log(2)
