"""The training objective, and the fields that a trained network stands for (SiT, arXiv 2401.08740, sections 2 and 3).

A `Transport` holds a path, what the network predicts, and how a sample's error is weighted. It knows no network: a
model is any callable ``model(x, t, **kwargs)`` with x (N, …), t (N,) and an output of x's shape.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sit_composer import choices
from sit_composer.bounds import choose
from sit_composer.errors import UserError
from sit_composer.interpolant import expand, make_path

Model = Callable[..., Tensor]


def at_least_float32(x: Tensor) -> torch.dtype:
    """x's dtype, or float32 if that has less than its precision."""
    return torch.promote_types(x.dtype, torch.float32)


def shift_times(u: Tensor, shift: float) -> Tensor:
    """Moves times u in [0, 1] towards the noise for a shift above 1, towards the data below 1; the ends stay.

    σ/α = (1 - u)/u of the linear path becomes larger by that factor (arXiv 2403.03206, eq. 23).
    """
    return u if shift == 1 else u / (u + shift * (1 - u))


@dataclass(eq=False)
class Transport:
    """A path with a prediction target and a loss weight. Invalid values raise a UserError.

    Args:
        path_type: ``Linear``, ``GVP`` or ``VP``.
        prediction: what the network's output is: the ``velocity``, the ``noise`` x₀, the ``score``, or the data ``x``.
        loss_weight: None, or the weight that turns a noise, score or data error into a ``velocity`` error, or one that
            is not of data into its part of a ``likelihood`` bound.
        train_eps: the distance of training times from the ends of [0, 1]. None is the path's own value where the
            field has a pole (1e-5 for VP, else 1e-3, as released), else 0; 0 is invalid where there is a pole.
        sample_eps: the same for sampling; None is 1e-3 where the field has a pole, else 0.
        time_sampling: the distribution of training times: ``uniform``, as in the paper, or ``logit-normal`` (arXiv
            2403.03206, eq. 19), the sigmoid of a normal number, which has more times in the middle.
        time_mean, time_std: that normal's; a mean above 0 favours times near the data.
        time_shift: moves these times towards the noise, as if σ/α were larger by this factor (arXiv 2403.03206,
            eq. 23); 1 leaves them. ``auto`` is √(dims / 4096), and moves the steps of sampling too. For latents of more
            than 4096 dimensions, that was found good (arXiv 2510.11690); for fewer, tests/benchmarks/time_sampling.py
            found it harmful.
        t_eps: with prediction ``x``, the least σ by which it is divided, in the loss and in sampling; JiT's clamp of
            1 - t (arXiv 2511.13720).
        dims: dimensions of a sample, for a time_shift of ``auto``.
    """

    path_type: str = "Linear"
    prediction: str = "velocity"
    loss_weight: str | None = None
    train_eps: float | None = None
    sample_eps: float | None = None
    time_sampling: str = "uniform"
    time_mean: float = 0.0
    time_std: float = 1.0
    time_shift: float | str = 1.0
    t_eps: float = 0.05
    dims: int | None = None

    def __post_init__(self) -> None:
        choose("path_type", self.path_type, choices.PATHS)
        choose("prediction", self.prediction, choices.PREDICTIONS)
        choose("loss_weight", self.loss_weight, choices.LOSS_WEIGHTS)
        choices.EPS.check("train_eps", self.train_eps or 0)
        choices.EPS.check("sample_eps", self.sample_eps or 0)
        choices.check_poles(self)
        choices.check_objective(self)
        choose("time_sampling", self.time_sampling, choices.TIME_SAMPLINGS)
        choices.FINITE.check("time_mean", self.time_mean)
        choices.POSITIVE.check("time_std", self.time_std)
        choices.SHIFT.check("time_shift", self.time_shift)
        choices.check_shift(self)
        choices.T_EPS.check("t_eps", self.t_eps)
        self.path = make_path(self.path_type)
        if isinstance(self.time_shift, str):
            if self.dims is None:
                raise UserError("dims: got None, expected the dimensions of a sample, as time_shift is auto")
            choices.COUNT.check("dims", self.dims)
            self.shift = self.sampling_shift = choices.dimension_shift(self.dims)
        else:  # of training's times, and of sampling's by default
            self.shift, self.sampling_shift = self.time_shift, 1.0

    def interval(
        self, sde: bool = False, eval: bool = False, diffusion_form: str = "sigma", last_step_size: float = 0.0
    ) -> tuple[float, float]:
        """The times (t0, t1) between which to train, or, with ``eval``, to integrate.

        A noise or score network has a pole in its velocity at t = 0 (α = 0), and in its score at t = 1 (σ = 0); SBDM's
        diffusion has one at t = 0. An x network has none, due to t_eps. An SDE stops last_step_size before the data: a
        step of another kind follows.
        """
        choose("diffusion_form", diffusion_form, choices.DIFFUSION_FORMS)
        facts = self.path.facts
        eps = self.sample_eps if eval else self.train_eps
        if eps is None:
            converted = self.prediction in choices.OVER_ALPHA or (self.loss_weight == "likelihood" and not eval)
            sbdm = sde and diffusion_form == "SBDM" and facts.pole_at_noise
            pole = converted or sbdm or facts.pole_at_data
            eps = (facts.sample_eps if eval else facts.train_eps) if pole else 0.0
        t0 = eps if facts.pole_at_noise else 0.0
        t1 = 1 - (last_step_size if sde and last_step_size > 0 else eps)
        return t0, t1

    def loss(self, model_output: Tensor, t: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
        """The weighted squared error of each sample, the mean over its elements: (N,), in float32 or float64.

        L_v and L_s of eqs. (6) and (7). Since v = (α̇/α) x + λ s with λ = σW/α, λ² turns a squared score error into
        the velocity's, and λ is the likelihood's weight; a noise error is σ times the score's. As v = (σ̇ x + W x̂) / σ,
        W / σ turns a data error into the velocity's: JiT's loss (arXiv 2511.13720), clamped by t_eps.
        """
        model_output = model_output.to(at_least_float32(model_output))
        if self.prediction == "x":
            te = expand(t, x1)
            factor = self.path.wronskian(te) / self.path.sigma(te)[0].clamp(min=self.t_eps)
            weight = 1.0 if self.loss_weight is None else factor**2
            return (weight * (model_output - x1) ** 2).flatten(1).mean(1)
        ut = self.path.interpolate(t, x0, x1)[1]
        te = expand(t, x1)
        sigma, factor = self.path.sigma(te)[0], self.path.score_variance(te)  # σ and λ, each (N, 1, …)
        if self.prediction == "velocity":
            error = model_output - ut
            weight = {None: 1.0, "velocity": 1.0, "likelihood": 1 / factor}[self.loss_weight]
        else:
            error = model_output - x0 if self.prediction == "noise" else sigma * model_output + x0
            weight = {None: 1.0, "velocity": (factor / sigma) ** 2, "likelihood": factor / sigma**2}[self.loss_weight]
        return (weight * error**2).flatten(1).mean(1)

    def loss_at(self, model: Model, t: Tensor, x0: Tensor, x1: Tensor, **model_kwargs) -> Tensor:
        """The `loss` (N,) of the model at x_t, for times t (N,), noise x0 and data x1, each (N, …)."""
        xt = self.path.interpolate(t, x0, x1)[0]
        return self.loss(model(xt.to(x1.dtype), t, **model_kwargs), t, x0, x1)

    def training_loss(self, model: Model, x1: Tensor, **model_kwargs) -> Tensor:
        """Draws t and x₀ ~ N(0, I), and returns each sample's `loss`: (N,)."""
        t, x0 = self.draw(x1)
        return self.loss_at(model, t, x0, x1, **model_kwargs)

    def draw(self, x1: Tensor) -> tuple[Tensor, Tensor]:
        """Training times t (N,) in `interval` and noise x₀ of x1's shape, from torch's own generator.

        Both have at least float32's precision: bfloat16 has 256 different times, 0 among them.
        """
        dtype = at_least_float32(x1)
        x0 = torch.randn_like(x1, dtype=dtype)
        return self.times(torch.rand(len(x1), device=x1.device, dtype=dtype)), x0

    def times(self, u: Tensor) -> Tensor:
        """The quantiles (N,) of the training times' distribution over `interval`, for u (N,) in [0, 1)."""
        if self.time_sampling == "logit-normal":
            u = torch.sigmoid(self.time_mean + self.time_std * torch.special.ndtri(u))
        u = shift_times(u, self.shift)
        t0, t1 = self.interval()
        return u * (t1 - t0) + t0

    def velocity(self, model: Model, x: Tensor, t: Tensor, **model_kwargs) -> Tensor:
        """The drift of the probability-flow ODE, eq. (2), at x (N, …) and t (N,), whatever the network predicts."""
        return self._velocity(model(x, t, **model_kwargs), x, t)

    def score(self, model: Model, x: Tensor, t: Tensor, **model_kwargs) -> Tensor:
        """∇ log p_t at x (N, …) and t (N,), whatever the network predicts."""
        return self._score(model(x, t, **model_kwargs), x, t)

    def velocity_and_score(self, model: Model, x: Tensor, t: Tensor, **model_kwargs) -> tuple[Tensor, Tensor]:
        """`velocity` and `score` from one evaluation of the network."""
        output = model(x, t, **model_kwargs)
        return self._velocity(output, x, t), self._score(output, x, t)

    def expected_data(self, model: Model, x: Tensor, t: Tensor, **model_kwargs) -> Tensor:
        """E[x₁ | x_t = x] = (x + σ² s) / α at x (N, …) and t (N,) (Tweedie), which an x network predicts."""
        if self.prediction == "x":
            return model(x, t, **model_kwargs)
        alpha, sigma = self.path.alpha(expand(t, x))[0], self.path.sigma(expand(t, x))[0]
        return x / alpha + sigma**2 / alpha * self.score(model, x, t, **model_kwargs)

    def _velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "x":
            return self.path.velocity_from_data(output, x, t, self.t_eps)
        if self.prediction == "noise":
            return self.path.velocity_from_noise(output, x, t)
        return self.path.velocity_from_score(output, x, t) if self.prediction == "score" else output

    def _score(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "x":
            return self.path.score_from_data(output, x, t, self.t_eps)
        if self.prediction == "noise":
            return self.path.score_from_noise(output, t)
        return self.path.score_from_velocity(output, x, t) if self.prediction == "velocity" else output

    def diffusion(self, x: Tensor, t: Tensor, form: str = "sigma", norm: float = 1.0) -> Tensor:
        """Half of the w_t of eq. (4) at t (N,), of shape (N, 1, …) for x (N, …); any w_t ≥ 0 keeps p_t.

        The SDE is dX = (v + diffusion · s) dt + √(2 · diffusion) dW. The forms are ``constant`` 1, ``SBDM`` σW/α,
        ``sigma`` σ, ``linear`` 1 - t and ``increasing-decreasing`` sin² πt, each times norm, and ``decreasing``
        ¼(norm · cos πt + 1)².
        """
        choose("diffusion_form", form, choices.DIFFUSION_FORMS)
        t = expand(t, x)
        if form == "constant":
            return torch.full_like(t, norm)
        if form == "SBDM":
            return norm * self.path.score_variance(t)
        if form == "sigma":
            return norm * self.path.sigma(t)[0]
        if form == "linear":
            return norm * (1 - t)
        if form == "decreasing":
            return 0.25 * (norm * (math.pi * t).cos() + 1) ** 2
        return norm * (math.pi * t).sin() ** 2
