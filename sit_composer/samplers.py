"""From noise to data: the probability-flow ODE, eq. (2) of SiT (arXiv 2401.08740), and the SDE, eq. (4)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint

from sit_composer import choices
from sit_composer.bounds import choose
from sit_composer.errors import UserError, one_line
from sit_composer.transport import Model, Transport, at_least_float32, shift_times

Field = Callable[[Tensor, Tensor], Tensor]  # of x (N, …) and t (N,)


class Counted:
    """A model that counts its evaluations, and shows each, x (N, …), t (N,) and its output, to a watcher if any."""

    def __init__(self, model: Model, watch: Callable[[Tensor, Tensor, Tensor], None] | None = None):
        self.model = model
        self.evaluations = 0
        self.watch = watch

    def __call__(self, x: Tensor, t: Tensor, **model_kwargs) -> Tensor:
        self.evaluations += 1
        output = self.model(x, t, **model_kwargs)
        if self.watch is not None:
            self.watch(x, t, output)
        return output


def check_solver(sampling_method: str, num_steps: int, atol: float, rtol: float) -> None:
    """Raises UserError for an unknown ODE solver, or for options with which it can't run."""
    choose("sampling_method", sampling_method, choices.ODE_METHODS)
    choices.TIME_POINTS.check("num_steps", num_steps)
    choices.check_tolerances(atol, rtol)


def integrate(drift: Callable, start: Any, times: Tensor, method: str, atol: float, rtol: float, overstep: bool) -> Any:
    """torchdiffeq's solution at all times, for a state that is a tensor or a tuple of tensors.

    With ``overstep``, an adaptive solver's last step may go past the last time, from where it interpolates back.
    """
    options = None
    if method == "explicit_adams":  # its order of 12 is unstable: with 100 steps, e⁻¹ comes out as 7
        options = {"max_order": 4}
    elif method in choices.ADAPTIVE_METHODS and not overstep:
        options = {"step_t": times[-1:]}
    method = "heun2" if method == "heun" else method
    try:
        return odeint(drift, start, times, method=method, atol=atol, rtol=rtol, options=options)
    except AssertionError as error:  # how torchdiffeq reports steps that became too small, or values that aren't finite
        advice = "try a larger atol or rtol"
        raise UserError(f"sampling_method: the solver gave up ({one_line(error)}); {advice}") from error


def in_float32(model: Model, z: Tensor) -> tuple[Model, Tensor]:
    """The model and z, for solvers in float32 at least. In half precision, times would coincide and steps be lost."""
    dtype = at_least_float32(z)
    if dtype == z.dtype:
        return model, z

    def cast(x: Tensor, t: Tensor, **model_kwargs) -> Tensor:
        return model(x.to(z.dtype), t, **model_kwargs).to(dtype)

    return cast, z.to(dtype)


def fixed_steps(drift: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Tensor, heun: bool) -> Tensor:
    """The end of Euler's or Heun's steps: torchdiffeq's bits, but no times are read, so that a GPU isn't waited for."""
    for time, dt in zip(times[:-1], times.diff(), strict=True):
        first = drift(time, x)
        if heun:
            second = drift(time + dt, x + dt * first)
            x = x + dt * (first * 0.5 + second * 0.5)
        else:
            x = x + dt * first
    return x


def time_points(t0: float, t1: float, num_steps: int, time_shift: float, like: Tensor) -> Tensor:
    """The times (num_steps,) of a fixed-step solver from t0 to t1: uniform, then moved by `shift_times`."""
    choices.POSITIVE.check("time_shift", time_shift)
    options = {"device": like.device, "dtype": like.dtype}
    if time_shift == 1:
        return torch.linspace(t0, t1, num_steps, **options)
    return t0 + (t1 - t0) * shift_times(torch.linspace(0, 1, num_steps, **options), time_shift)


@torch.no_grad()
def sample_ode(
    tr: Transport,
    model: Model,
    z: Tensor,
    *,
    sampling_method: str = "dopri5",
    num_steps: int = 50,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    reverse: bool = False,
    time_shift: float | None = None,
    **model_kwargs,
) -> Tensor:
    """Integrates dx = v(x, t) dt from noise z (N, …) at t = 0 to data at t = 1; returns the final batch (N, …).

    An invalid option, or a solver that gives up, raises a UserError.

    Args:
        sampling_method: a solver of torchdiffeq (euler, heun2, heun3, midpoint, rk4, dopri5, dopri8, …), or heun, whose
            last step of a network that predicts x is Euler's (as in JiT, arXiv 2511.13720).
        num_steps: time points, both ends included: a fixed-step solver takes num_steps - 1 steps. An adaptive one
            chooses its own, by atol and rtol.
        reverse: from data to noise instead; z is then data.
        time_shift: moves a fixed-step solver's times, see `transport.shift_times`: above 1, its steps near the noise
            are shorter, below 1 those near the data. 1 is uniform; None is the transport's own, which is 1 unless its
            time_shift is auto. An adaptive solver ends at the same times.
    """
    time_shift = tr.sampling_shift if time_shift is None else time_shift
    check_solver(sampling_method, num_steps, atol, rtol)
    t0, t1 = tr.interval(eval=True)
    if reverse:
        t0, t1 = t1, t0
    model, x = in_float32(model, z)
    times = time_points(t0, t1, num_steps, time_shift if not reverse else 1 / time_shift, x)

    def drift(t: Tensor, x: Tensor) -> Tensor:
        return tr.velocity(model, x, t.expand(len(x)), **model_kwargs)

    if sampling_method in ("euler", "heun", "heun2"):
        heun = sampling_method != "euler"
        if heun and tr.prediction == "x" and not reverse:
            # JiT's last step is Euler's: Heun's second evaluation, at the data, would divide by t_eps.
            x, times, heun = fixed_steps(drift, x, times[:-1], heun), times[-2:], False
        return fixed_steps(drift, x, times, heun).to(z.dtype)
    overstep = not tr.path.facts.pole_at_data  # beyond which there is no path
    return integrate(drift, x, times, sampling_method, atol, rtol, overstep)[-1].to(z.dtype)


def _euler(drift: Field, diffusion: Field, x: Tensor, t: Tensor, dt: Tensor, dw: Tensor) -> Tensor:
    """A step of Euler and Maruyama."""
    return x + drift(x, t) * dt + (2 * diffusion(x, t)).sqrt() * dw


def _heun(drift: Field, diffusion: Field, x: Tensor, t: Tensor, dt: Tensor, dw: Tensor) -> Tensor:
    """The step's noise first, then Heun's step along the drift."""
    x = x + (2 * diffusion(x, t)).sqrt() * dw
    first = drift(x, t)
    second = drift(x + dt * first, t + dt)
    return x + 0.5 * dt * (first + second)


SDE_STEPS = {"Euler": _euler, "Heun": _heun}  # by the names in choices.SDE_METHODS


@torch.no_grad()
def sample_sde(
    tr: Transport,
    model: Model,
    z: Tensor,
    *,
    sampling_method: str = "Euler",
    diffusion_form: str = "sigma",
    diffusion_norm: float = 1.0,
    last_step: str | None = "Mean",
    last_step_size: float = 0.04,
    num_steps: int = 250,
    time_shift: float | None = None,
    draw: Callable[[], Tensor] | None = None,
    **model_kwargs,
) -> Tensor:
    """Integrates dx = (v + w s) dt + √(2w) dW from noise z (N, …); returns the final batch (N, …).

    Args:
        sampling_method: ``Euler`` (Euler-Maruyama: mean and variance are of order 1) or ``Heun`` (two evaluations per
            step; it adds a step's noise at the step's start, so that the mean is of order 2, the variance of order 1).
        diffusion_form, diffusion_norm: the w of `Transport.diffusion`.
        last_step: the last step, of size last_step_size, without noise: ``Mean`` (along the SDE's drift), ``Euler``
            (along the ODE's), ``Tweedie`` (to the expected data), or None (no last step). ``Mean`` leaves out the noise
            of that time: use it with a form that is 0 at the data, or with a small size.
        num_steps: time points before the last step.
        time_shift: moves these times, as in `sample_ode`.
        draw: returns each step's noise, of z's shape; None is torch.randn.
    """
    time_shift = tr.sampling_shift if time_shift is None else time_shift
    choose("sampling_method", sampling_method, choices.SDE_METHODS)
    choose("last_step", last_step, choices.LAST_STEPS)
    choices.TIME_POINTS.check("num_steps", num_steps)
    if last_step is not None:
        choices.INSIDE_UNIT.check("last_step_size", last_step_size)
    size = 0.0 if last_step is None else last_step_size
    t0, t1 = tr.interval(sde=True, eval=True, diffusion_form=diffusion_form, last_step_size=size)
    if sampling_method == "Heun" and t1 == 1:
        t1 = 1 - tr.path.facts.sample_eps  # Heun evaluates the score at its end, where the score has a pole
    model, x = in_float32(model, z)
    times = time_points(t0, t1, num_steps, time_shift, x)
    steps = times.diff() if time_shift != 1 else (times[1] - times[0]).expand(num_steps - 1)
    if draw is None:
        draw = partial(torch.randn, x.shape, device=x.device, dtype=x.dtype)

    def diffusion(x: Tensor, t: Tensor) -> Tensor:
        return tr.diffusion(x, t, diffusion_form, diffusion_norm)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        velocity, score = tr.velocity_and_score(model, x, t, **model_kwargs)
        return velocity + diffusion(x, t) * score

    for time, dt in zip(times[:-1], steps, strict=True):
        x = SDE_STEPS[sampling_method](drift, diffusion, x, time.expand(len(x)), dt, draw() * dt.sqrt())
    t = times[-1].expand(len(x))
    if last_step == "Mean":
        x = x + drift(x, t) * last_step_size
    elif last_step == "Euler":
        x = x + tr.velocity(model, x, t, **model_kwargs) * last_step_size
    elif last_step == "Tweedie":
        x = tr.expected_data(model, x, t, **model_kwargs)
    return x.to(z.dtype)
