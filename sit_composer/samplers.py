"""From noise to data: the probability-flow ODE, eq. (2) of SiT (arXiv 2401.08740), and the SDE, eq. (4).

A model is any callable ``model(x, t, **kwargs)``; wrap it in `Counted` to learn how often it was evaluated.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint

from sit_composer.choices import ADAPTIVE_METHODS, LAST_STEPS, ODE_METHODS, SDE_METHODS, choose
from sit_composer.errors import UserError
from sit_composer.transport import SINGULAR_EPS, Transport, at_least_float32


class Counted:
    """A model that counts its evaluations."""

    def __init__(self, model):
        self.model = model
        self.evaluations = 0

    def __call__(self, x: Tensor, t: Tensor, **model_kwargs) -> Tensor:
        self.evaluations += 1
        return self.model(x, t, **model_kwargs)


def check_steps(num_steps: int) -> None:
    """Raises UserError for fewer than two time points."""
    if num_steps < 2:
        raise UserError(f"num_steps: got {num_steps}; it takes 2 or more, as it counts the time points, both ends too")


def check_tolerances(atol: float, rtol: float) -> None:
    """Raises UserError for two zeros, for which an adaptive solver would take ever smaller steps, for ever."""
    if not (min(atol, rtol) >= 0 and max(atol, rtol) > 0):
        raise UserError(f"atol, rtol: got {atol:g} and {rtol:g}; they take numbers above 0")


def solver(sampling_method: str, stop_at: Tensor | None = None) -> dict[str, Any]:
    """The solver as torchdiffeq takes it. An adaptive one's last step goes past the end, and back by interpolation;
    given the time ``stop_at`` (1,), it ends there."""
    method = "heun2" if sampling_method == "heun" else sampling_method
    options = None
    if method == "explicit_adams":  # its order of 12 is unstable: with 100 steps, e⁻¹ comes out as 7
        options = {"max_order": 4}
    elif method in ADAPTIVE_METHODS and stop_at is not None:
        options = {"step_t": stop_at}
    return {"method": method, "options": options}


def in_float32(model, z: Tensor) -> tuple[Any, Tensor]:
    """The model and its state, as samplers take them: of half precision, times would coincide and steps be lost."""
    dtype = at_least_float32(z)
    if dtype == z.dtype:
        return model, z

    def cast(x: Tensor, t: Tensor, **model_kwargs) -> Tensor:
        return model(x.to(z.dtype), t, **model_kwargs).to(dtype)

    return cast, z.to(dtype)


@torch.no_grad()
def sample_ode(
    tr: Transport,
    model,
    z: Tensor,
    *,
    sampling_method: str = "dopri5",
    num_steps: int = 50,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    reverse: bool = False,
    **model_kwargs,
) -> Tensor:
    """Integrates dx = v(x, t) dt from noise z (N, …) at t = 0 to data at t = 1; returns the final batch (N, …).

    Args:
        sampling_method: a solver of torchdiffeq (euler, heun2, heun3, midpoint, rk4, dopri5, dopri8, …), or heun.
        num_steps: time points, both ends included: a fixed-step solver takes num_steps - 1 steps. An adaptive one
            chooses its own, by atol and rtol.
        reverse: from data to noise instead; z is then data.

    Raises:
        UserError: for an unknown solver, fewer than 2 time points, or no tolerance.
    """
    choose("sampling_method", sampling_method, ODE_METHODS)
    check_steps(num_steps)
    check_tolerances(atol, rtol)
    t0, t1 = tr.interval(eval=True)
    if reverse:
        t0, t1 = t1, t0
    model, x = in_float32(model, z)
    times = torch.linspace(t0, t1, num_steps, device=x.device, dtype=x.dtype)

    def drift(t: Tensor, x: Tensor) -> Tensor:
        return tr.velocity(model, x, t.expand(len(x)), **model_kwargs)

    # VP has no σ beyond t = 1: it is the square root of less than 0.
    how = solver(sampling_method, stop_at=times[-1:] if tr.path_type == "VP" else None)
    return odeint(drift, x, times, atol=atol, rtol=rtol, **how)[-1].to(z.dtype)


@torch.no_grad()
def sample_sde(
    tr: Transport,
    model,
    z: Tensor,
    *,
    sampling_method: str = "Euler",
    diffusion_form: str = "sigma",
    diffusion_norm: float = 1.0,
    last_step: str | None = "Mean",
    last_step_size: float = 0.04,
    num_steps: int = 250,
    draw: Callable[[], Tensor] | None = None,
    **model_kwargs,
) -> Tensor:
    """Integrates dx = (v + w s) dt + √(2w) dW from noise z (N, …); returns the final batch (N, …).

    Args:
        sampling_method: ``Euler`` (Euler-Maruyama: mean and variance are of order 1) or ``Heun`` (two evaluations a
            step: as it adds a step's noise at its start, the mean is of order 2 and the variance still of order 1).
        diffusion_form, diffusion_norm: the w of `Transport.diffusion`.
        last_step: how the last last_step_size of time is crossed, without noise: ``Mean`` (the SDE's drift),
            ``Euler`` (the ODE's), ``Tweedie`` (straight to the expected data), or None (there is no last step).
            ``Mean`` leaves out that stretch's noise: take a form that is 0 at the data with it, or a small size.
        num_steps: time points before the last step.
        draw: gives each step's noise, of z's shape; None is torch.randn.

    Raises:
        UserError: for an unknown method, form or last step, a last step outside (0, 1), or too few time points.
    """
    choose("sampling_method", sampling_method, SDE_METHODS)
    choose("last_step", last_step, LAST_STEPS)
    check_steps(num_steps)
    if last_step is None:
        last_step_size = 0.0
    elif not 0 < last_step_size < 1:
        raise UserError(f"last_step_size: got {last_step_size}; it takes a number in (0, 1)")
    t0, t1 = tr.interval(sde=True, eval=True, diffusion_form=diffusion_form, last_step_size=last_step_size)
    if sampling_method == "Heun" and t1 == 1:
        t1 = 1 - SINGULAR_EPS  # Heun evaluates the score at its end, where it has a pole
    model, x = in_float32(model, z)
    times = torch.linspace(t0, t1, num_steps, device=x.device, dtype=x.dtype)

    def drift_and_diffusion(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        velocity, score = tr.velocity_and_score(model, x, t, **model_kwargs)
        diffusion = tr.diffusion(x, t, diffusion_form, diffusion_norm)
        return velocity + diffusion * score, diffusion

    if draw is None:
        draw = partial(torch.randn, x.shape, device=x.device, dtype=x.dtype)
    dt = times[1] - times[0]
    for time in times[:-1]:
        t = time.expand(len(x))
        dw = draw() * dt.sqrt()
        if sampling_method == "Euler":
            drift, diffusion = drift_and_diffusion(x, t)
            x = x + drift * dt + (2 * diffusion).sqrt() * dw
        else:  # the noise first, then Heun's step for the drift
            x = x + (2 * tr.diffusion(x, t, diffusion_form, diffusion_norm)).sqrt() * dw
            first, _ = drift_and_diffusion(x, t)
            second, _ = drift_and_diffusion(x + dt * first, t + dt)
            x = x + 0.5 * dt * (first + second)

    t = times[-1].expand(len(x))
    if last_step == "Mean":
        x = x + drift_and_diffusion(x, t)[0] * last_step_size
    elif last_step == "Euler":
        x = x + tr.velocity(model, x, t, **model_kwargs) * last_step_size
    elif last_step == "Tweedie":  # E[x₁ | x] = (x + σ² s) / α
        alpha, sigma = tr.path.alpha(times[-1])[0], tr.path.sigma(times[-1])[0]
        x = x / alpha + sigma**2 / alpha * tr.score(model, x, t, **model_kwargs)
    return x.to(z.dtype)
