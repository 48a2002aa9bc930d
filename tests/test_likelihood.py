import math
import re

import pytest
import torch

from sit_composer.errors import UserError
from sit_composer.likelihood import bits_per_dim, log_likelihood
from sit_composer.names import PATHS, PREDICTIONS
from sit_composer.transport import Transport
from tests.test_samplers import MEAN, STD, gaussian


def exact_log_p(x, mean=MEAN, std=STD):
    return torch.distributions.Normal(mean, std).log_prob(x).flatten(1).sum(1)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("path", ["Linear", "GVP"])
def test_a_gaussians_density_is_the_closed_forms(path, exact):
    tr = Transport(path)
    x = MEAN + STD * torch.randn(64, 1, 3, 3, dtype=torch.float64)
    got = log_likelihood(tr, gaussian(tr), x, exact=exact, rtol=1e-5)  # one scale in all dimensions: one probe is exact
    torch.testing.assert_close(got, exact_log_p(x), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_and_prediction_is_within_a_percent(path, prediction):
    tr = Transport(path, prediction)
    x = MEAN + STD * torch.randn(256, 1, 3, 3, dtype=torch.float64)
    got = log_likelihood(tr, gaussian(tr), x)
    assert got.mean().item() == pytest.approx(exact_log_p(x).mean().item(), rel=0.01)


MIX = torch.tensor([[1.0, 0.6], [0.0, 0.5]], dtype=torch.float64)


def correlated(tr: Transport):
    """The exact velocity for data ~ N(0, MIX MIXᵀ), whose derivative is no multiple of the identity."""
    covariance = MIX @ MIX.T

    def model(x, t):
        (alpha, d_alpha), (sigma, d_sigma) = tr.path.alpha(t), tr.path.sigma(t)
        total = alpha[:, None, None] ** 2 * covariance + sigma[:, None, None] ** 2 * torch.eye(2, dtype=x.dtype)
        centred = torch.linalg.solve(total, x)
        return (d_alpha * alpha)[:, None] * centred @ covariance + (d_sigma * sigma)[:, None] * centred

    return model


def test_probes_average_to_the_trace_and_are_fixed_over_one_solve():
    tr = Transport()
    x = torch.randn(512, 2, dtype=torch.float64) @ MIX.T
    truth = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=x.dtype), MIX @ MIX.T).log_prob(x)
    exact = log_likelihood(tr, correlated(tr), x, exact=True, rtol=1e-6)
    torch.testing.assert_close(exact, truth, rtol=1e-3, atol=1e-3)
    deviations = [
        (log_likelihood(tr, correlated(tr), x, probes=n, generator=torch.Generator().manual_seed(0)) - truth).std()
        for n in (1, 16)
    ]
    assert deviations[1] < deviations[0] / 3  # 1/√16, but for chance
    again = [
        log_likelihood(tr, correlated(tr), x[:4], generator=torch.Generator().manual_seed(1), sampling_method=m)
        for m in ("dopri5", "dopri8")
    ]
    torch.testing.assert_close(*again, rtol=1e-2, atol=1e-2)  # the same probes, whatever the solver's calls


def test_parameters_get_no_gradient(tiny):
    log_likelihood(
        Transport(), tiny, torch.randn(2, 4, 8, 8), sampling_method="euler", num_steps=3, y=torch.tensor([1, 2])
    )
    assert all(p.grad is None for p in tiny.parameters())


def test_bits_of_a_uniform_level_are_eight():
    log_p = torch.full((1,), 10 * math.log(1 / 2))  # uniform on [-1, 1], in ten dimensions
    assert bits_per_dim(log_p, 10).item() == pytest.approx(math.log2(255))


@pytest.mark.parametrize(
    ("option", "named"), [({"probes": 0}, "probes: got 0"), ({"num_steps": 1}, "num_steps: got 1")]
)
def test_a_wrong_option_is_named(option, named):
    with pytest.raises(UserError, match=re.escape(named)):
        log_likelihood(Transport(), None, torch.zeros(1, 1), **option)
