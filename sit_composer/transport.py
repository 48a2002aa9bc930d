"""The training objective, and the fields that a trained network stands for (SiT, arXiv 2401.08740, sections 2 and 3).

A `Transport` holds a path, what the network predicts, and how a sample's error is weighted. It knows no network: a
model is any callable ``model(x, t, **kwargs)`` with x (N, …), t (N,) and an output of x's shape.
"""

import math

import torch
from torch import Tensor

from sit_composer.choices import DIFFUSION_FORMS, LOSS_WEIGHTS, PREDICTIONS, TIME_SAMPLINGS, choose
from sit_composer.errors import UserError
from sit_composer.interpolant import PATHS, expand

SINGULAR_EPS = 1e-3  # how far training and sampling stay from an end of [0, 1] where the field has a pole


def at_least_float32(x: Tensor) -> torch.dtype:
    """x's dtype, or float32 if that has less than its precision."""
    return torch.promote_types(x.dtype, torch.float32)


class Transport:
    """A path with a prediction target and a loss weight.

    Args:
        path_type: ``Linear``, ``GVP`` or ``VP``.
        prediction: what the network's output is: the ``velocity``, the ``noise`` x₀, or the ``score``.
        loss_weight: None, or the weight that makes a noise or score error a ``velocity`` error, or its part of a
            ``likelihood`` bound.
        train_eps: how far from the ends of [0, 1] training times stay; None is 1e-5 for VP, 0 for velocity on
            the other paths, whose field has no pole, and 1e-3 otherwise, as released.
        sample_eps: the same for sampling; None is 0 for velocity but for VP's, 1e-3 otherwise. Either eps, when given,
            counts.
        time_sampling: how training times are drawn: ``uniform``, as in the paper, or ``logit-normal`` (arXiv
            2403.03206, eq. 19): the sigmoid of a normal number, which is more often in the middle.
        time_mean, time_std: that normal's; a mean above 0 favours times near the data.
        time_shift: of training times, so drawn, towards the noise, as if sigma were so many times larger (arXiv
            2403.03206, eq. 23); 1 is none. For latents of more than 4096 dimensions, √(dimensions / 4096) has been
            found good (arXiv 2510.11690); below it, tests/benchmarks/time_sampling.py found that rule to do harm.

    Raises:
        UserError: for a name that is none of the above, or an eps outside [0, ½).
    """

    def __init__(
        self,
        path_type: str = "Linear",
        prediction: str = "velocity",
        loss_weight: str | None = None,
        train_eps: float | None = None,
        sample_eps: float | None = None,
        time_sampling: str = "uniform",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        time_shift: float = 1.0,
    ):
        choose("path_type", path_type, tuple(PATHS))
        choose("prediction", prediction, PREDICTIONS)
        choose("loss_weight", loss_weight, LOSS_WEIGHTS)
        for name, eps in (("train_eps", train_eps), ("sample_eps", sample_eps)):
            if eps is not None and not 0 <= eps < 0.5:
                raise UserError(f"{name}: got {eps}; it takes a number in [0, 0.5)")
        if sample_eps == 0 and (prediction != "velocity" or path_type == "VP"):
            pole = 1 if path_type == "VP" else 0
            raise UserError(f"sample_eps: got 0; {path_type} with {prediction} has a pole at t = {pole}, it takes more")
        choose("time_sampling", time_sampling, TIME_SAMPLINGS)
        if not time_std > 0:
            raise UserError(f"time_std: got {time_std}; it takes a number above 0")
        if not 0 < time_shift < math.inf:
            raise UserError(f"time_shift: got {time_shift}; it takes a number above 0")
        self.path_type = path_type
        self.path = PATHS[path_type]()
        self.prediction = prediction
        self.loss_weight = loss_weight
        self.train_eps = train_eps
        self.sample_eps = sample_eps
        self.time_sampling = time_sampling
        self.time_mean = time_mean
        self.time_std = time_std
        self.time_shift = time_shift

    def interval(
        self, sde: bool = False, eval: bool = False, diffusion_form: str = "sigma", last_step_size: float = 0.0
    ) -> tuple[float, float]:
        """The times (t0, t1) between which to train, or, with ``eval``, to integrate.

        A noise or score network has a pole in its velocity at t = 0 (α = 0); scores have one at t = 1 (σ = 0), and
        SBDM's diffusion at t = 0. An SDE leaves its last_step_size to a last step of another kind.
        """
        choose("diffusion_form", diffusion_form, DIFFUSION_FORMS)
        given = self.sample_eps if eval else self.train_eps
        pole = self.prediction != "velocity" or (self.loss_weight == "likelihood" and not eval)
        sbdm_pole = sde and diffusion_form == "SBDM" and self.path.singular_at_noise
        if given is not None:
            eps = given
        elif self.path_type == "VP":
            eps = SINGULAR_EPS if eval else 1e-5
        else:
            eps = SINGULAR_EPS if pole or sbdm_pole else 0.0
        t0 = eps if self.path.singular_at_noise and (pole or sbdm_pole or given is not None) else 0.0
        if sde and last_step_size > 0:
            t1 = 1 - last_step_size
        elif self.path_type == "VP" or pole or sde or given is not None:
            t1 = 1 - eps
        else:
            t1 = 1.0
        return t0, t1

    def loss(self, model_output: Tensor, t: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
        """The weighted squared error of each sample, mean over its elements: (N,), float32 at least.

        L_v and L_s of eqs. (6) and (7). Since v = (α̇/α) x + λ s with λ = σW/α, the weight that turns a score error
        into the velocity's is λ², and the likelihood's is λ; a noise error is the score's times σ.
        """
        model_output = model_output.to(at_least_float32(model_output))
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

    def training_loss(self, model, x1: Tensor, **model_kwargs) -> Tensor:
        """Draws x₀ ~ N(0, I), then t, and gives each sample's `loss`: (N,)."""
        t, x0 = self.draw(x1)
        return self.loss_at(model, t, x0, x1, **model_kwargs)

    def loss_at(self, model, t: Tensor, x0: Tensor, x1: Tensor, **model_kwargs) -> Tensor:
        """Each sample's `loss` at times t (N,) and noise x₀: (N,)."""
        xt = self.path.interpolate(t, x0, x1)[0]
        return self.loss(model(xt.to(x1.dtype), t, **model_kwargs), t, x0, x1)

    def draw(self, x1: Tensor) -> tuple[Tensor, Tensor]:
        """Training times t (N,) on `interval` and noise x₀ of x1's shape, from torch's own generator.

        Both are float32 at least: bfloat16 has 256 different times, 0 among them.
        """
        dtype = at_least_float32(x1)
        x0 = torch.randn_like(x1, dtype=dtype)
        return self.times(torch.rand(len(x1), device=x1.device, dtype=dtype)), x0

    def times(self, u: Tensor) -> Tensor:
        """The training times, on `interval`, whose part u (N,) of all lies below: their distribution's quantiles."""
        if self.time_sampling == "logit-normal":
            u = torch.sigmoid(self.time_mean + self.time_std * torch.special.ndtri(u))
        if self.time_shift != 1:
            u = u / (u + self.time_shift * (1 - u))  # σ / α of the linear path, which is (1 - u) / u, times the shift
        t0, t1 = self.interval()
        return u * (t1 - t0) + t0

    def velocity(self, model, x: Tensor, t: Tensor, **model_kwargs) -> Tensor:
        """The drift of the probability-flow ODE, eq. (2), at x (N, …) and t (N,), whatever the network predicts."""
        output = model(x, t, **model_kwargs)
        if self.prediction == "noise":
            return self.path.velocity_from_noise(output, x, t)
        if self.prediction == "score":
            return self.path.velocity_from_score(output, x, t)
        return output

    def score(self, model, x: Tensor, t: Tensor, **model_kwargs) -> Tensor:
        """∇ log p_t at x (N, …) and t (N,), whatever the network predicts."""
        output = model(x, t, **model_kwargs)
        if self.prediction == "noise":
            return self.path.score_from_noise(output, t)
        if self.prediction == "velocity":
            return self.path.score_from_velocity(output, x, t)
        return output

    def velocity_and_score(self, model, x: Tensor, t: Tensor, **model_kwargs) -> tuple[Tensor, Tensor]:
        """Both from one evaluation of the network."""
        output = model(x, t, **model_kwargs)

        def evaluated(*_: object, **__: object) -> Tensor:
            return output

        return self.velocity(evaluated, x, t), self.score(evaluated, x, t)

    def diffusion(self, x: Tensor, t: Tensor, form: str = "sigma", norm: float = 1.0) -> Tensor:
        """Half of the w_t of eq. (4) at t (N,), of shape (N, 1, …) for x (N, …); any that is ≥ 0 keeps p_t.

        The SDE is dX = (v + diffusion · s) dt + √(2 · diffusion) dW. The forms are ``constant`` 1, ``SBDM`` σW/α,
        ``sigma`` σ, ``linear`` 1 - t and ``increasing-decreasing`` sin² πt, each times norm, and ``decreasing``
        ¼(norm · cos πt + 1)².
        """
        choose("diffusion_form", form, DIFFUSION_FORMS)
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
