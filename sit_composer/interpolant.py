"""The paths between noise and data: x_t = α_t x₁ + σ_t x₀, eq. (1) of SiT (arXiv 2401.08740).

Time runs from noise, x_0 = x₀ ~ N(0, I), to data, x_1 = x₁: the paper's t is our 1 - t. A path is its α_t, σ_t and
their derivatives. Velocity v, score s, noise ε and data x̂ describe one field, and are converted into each other here.

With the Wronskian W_t = α̇_t σ_t - α_t σ̇_t, solving x = α x₁ + σ ε, v = α̇ x₁ + σ̇ ε for the noise gives

    ε = (α̇ x - α v) / W,        s = -ε / σ,        v = (α̇/α) x + (σ W / α) s.

The second is eq. (8) without its removable 0/0, and the third is that equation solved for v. Solved for the data,

    x̂ = (σ v - σ̇ x) / W,        v = (σ̇ x + W x̂) / σ,        ε = (x - α x̂) / σ,

which for straight lines are JiT's (arXiv 2511.13720): v = (x̂ - x) / (1 - t). Its clamp of that denominator is
`floor` here: σ is taken as at least so much where it divides, so that nothing has a pole at the data.

To add a path, write its class here and add its name and poles to `choices.PATHS`.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sit_composer.choices import PATHS, PathFacts


def expand(t: Tensor, x: Tensor) -> Tensor:
    """t (N,) as (N, 1, …, 1), which broadcasts over x (N, …)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


class Interpolant(ABC):
    """A path. All methods work elementwise in t, and keep its shape and dtype."""

    @property
    def facts(self) -> PathFacts:
        """The path's poles."""
        return PATHS[type(self).__name__]

    @abstractmethod
    def alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and α̇_t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """σ_t and σ̇_t."""

    def wronskian(self, t: Tensor) -> Tensor:
        """W_t = α̇_t σ_t - α_t σ̇_t, positive on [0, 1)."""
        (alpha, d_alpha), (sigma, d_sigma) = self.alpha(t), self.sigma(t)
        return d_alpha * sigma - alpha * d_sigma

    def interpolate(self, t: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        """x_t = α x₁ + σ x₀ and its velocity u_t = α̇ x₁ + σ̇ x₀, eqs. (1) and (3); t is (N,), the rest (N, …)."""
        t = expand(t, x1)
        (alpha, d_alpha), (sigma, d_sigma) = self.alpha(t), self.sigma(t)
        return alpha * x1 + sigma * x0, d_alpha * x1 + d_sigma * x0

    def score_variance(self, t: Tensor) -> Tensor:
        """λ_t = (α̇/α) σ² - σ σ̇ = σ W / α, the score's factor in the velocity, and half of SBDM's g²."""
        return self.sigma(t)[0] * self.wronskian(t) / self.alpha(t)[0]

    def noise_from_velocity(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """ε = (α̇ x - α v) / W."""
        t = expand(t, x)
        alpha, d_alpha = self.alpha(t)
        return (d_alpha * x - alpha * v) / self.wronskian(t)

    def score_from_velocity(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """s = -ε / σ, eqs. (5) and (8), with a pole at t = 1, where σ = 0."""
        return -self.noise_from_velocity(v, x, t) / self.sigma(expand(t, x))[0]

    def score_from_noise(self, noise: Tensor, t: Tensor) -> Tensor:
        """s = -ε / σ, with a pole at t = 1."""
        return -noise / self.sigma(expand(t, noise))[0]

    def velocity_from_score(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """v = (α̇/α) x + (σ W / α) s, with a pole at t = 0 if α_0 = 0."""
        t = expand(t, x)
        alpha, d_alpha = self.alpha(t)
        return d_alpha / alpha * x + self.score_variance(t) * score

    def velocity_from_noise(self, noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """v = (α̇ x - W ε) / α, with a pole at t = 0 if α_0 = 0, and VP's at t = 1, where σ̇ is infinite."""
        t = expand(t, x)
        alpha, d_alpha = self.alpha(t)
        return (d_alpha * x - self.wronskian(t) * noise) / alpha

    def velocity_from_data(self, data: Tensor, x: Tensor, t: Tensor, floor: float = 0.0) -> Tensor:
        """v = (σ̇ x + W x̂) / σ, with a pole at t = 1 without a floor."""
        t = expand(t, x)
        sigma, d_sigma = self.sigma(t)
        return (d_sigma * x + self.wronskian(t) * data) / sigma.clamp(min=floor)

    def noise_from_data(self, data: Tensor, x: Tensor, t: Tensor, floor: float = 0.0) -> Tensor:
        """ε = (x - α x̂) / σ, with a pole at t = 1 without a floor."""
        t = expand(t, x)
        return (x - self.alpha(t)[0] * data) / self.sigma(t)[0].clamp(min=floor)

    def score_from_data(self, data: Tensor, x: Tensor, t: Tensor, floor: float = 0.0) -> Tensor:
        """s = -ε / σ, with a pole at t = 1 without a floor."""
        return -self.noise_from_data(data, x, t, floor) / self.sigma(expand(t, x))[0].clamp(min=floor)


class Linear(Interpolant):
    """α = t, σ = 1 - t: straight lines."""

    def alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t, torch.ones_like(t)

    def sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, -torch.ones_like(t)


class GVP(Interpolant):
    """α = sin(πt/2), σ = cos(πt/2): variance-preserving, α² + σ² = 1."""

    def alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = t * (math.pi / 2)
        return angle.sin(), math.pi / 2 * angle.cos()

    def sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = t * (math.pi / 2)
        return angle.cos(), -math.pi / 2 * angle.sin()


class VP(Interpolant):
    """α = exp(-½∫β), σ² = 1 - α²: the variance-preserving diffusion of arXiv 2011.13456, appendix C.

    β is linear in the diffusion's time 1 - t, from beta_min at the data to beta_max at the noise; α_0 = exp(-5.03).
    """

    beta_min = 0.1
    beta_max = 20.0

    def _log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log α_t and its derivative β/2."""
        s, span = 1 - t, self.beta_max - self.beta_min
        return -0.25 * s**2 * span - 0.5 * s * self.beta_min, 0.5 * s * span + 0.5 * self.beta_min

    def alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha, d_log_alpha = self._log_alpha(t)
        alpha = log_alpha.exp()
        return alpha, alpha * d_log_alpha

    def sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha, d_log_alpha = self._log_alpha(t)
        sigma = (-torch.expm1(2 * log_alpha)).sqrt()  # expm1, as 1 - exp loses every digit as t -> 1
        return sigma, -(2 * log_alpha).exp() * d_log_alpha / sigma

    def score_variance(self, t: Tensor) -> Tensor:
        """λ = β/2, which is finite at t = 1 too, where σ = 0 and W is infinite."""
        return self._log_alpha(t)[1]


def make_path(name: str) -> Interpolant:
    """The path of a name in `choices.PATHS`, which is its class's."""
    return {cls.__name__: cls for cls in Interpolant.__subclasses__()}[name]()
