import math
import re

import pytest
import torch
from torchdiffeq import odeint

from sit_composer.autoencoder import from_uint8
from sit_composer.choices import PATHS, PREDICTIONS
from sit_composer.errors import UserError
from sit_composer.likelihood import bits_per_dim, dequantize, log_likelihood
from sit_composer.samplers import sample_ode
from sit_composer.transport import Transport
from tests.helpers.gaussian import MEAN, STD, gaussian


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


def published_estimate(tr: Transport, model, x: torch.Tensor, num_steps: int, seed: int, **model_kwargs):
    """log p as the authors' code estimates it: by one new probe at each of the solver's calls."""
    generator = torch.Generator().manual_seed(seed)

    def drift(t, state):
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            v = tr.velocity(model, x, t.expand(len(x)), **model_kwargs)
            probe = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
            estimate = torch.autograd.grad((v * probe).sum(), x)[0] * probe
        return v.detach(), estimate.flatten(1).sum(1)

    t0, t1 = tr.interval(eval=True)
    start = (x, x.new_zeros(len(x)))
    z, change = odeint(drift, start, torch.linspace(t1, t0, num_steps, dtype=x.dtype), method="heun2")
    return torch.distributions.Normal(0, 1).log_prob(z[-1]).flatten(1).sum(1) + change[-1]


@pytest.mark.parametrize("field", ["network", "correlated"])
def test_the_published_estimate_is_ours_within_its_own_noise(field, tiny):
    """Both are unbiased with a fixed-step solver: over many repeats, the means agree with each other and the trace."""
    tr, repeats, num_steps = Transport(), 256, 5
    torch.manual_seed(0)
    if field == "network":
        tiny.requires_grad_(False)
        model, x, y = tiny.double(), torch.randn(1, 4, 8, 8, dtype=torch.float64), {"y": torch.tensor([3])}
    else:
        model, x, y = correlated(tr), torch.tensor([[1.5, -0.5]], dtype=torch.float64), {}
    solver = {"sampling_method": "heun", "num_steps": num_steps}
    exact = log_likelihood(tr, model, x, exact=True, **solver, **y)
    z = sample_ode(tr, model, x, reverse=True, **solver, **y)
    integral = (exact - torch.distributions.Normal(0, 1).log_prob(z).sum()).abs()  # of ∇·v: what is estimated
    many, labels = x.expand(repeats, *x.shape[1:]), {name: label.expand(repeats) for name, label in y.items()}
    published = published_estimate(tr, model, many, num_steps, seed=1, **labels)
    ours = log_likelihood(tr, model, many, generator=torch.Generator().manual_seed(2), **solver, **labels)
    for estimate in (published, ours):
        error = estimate.std() / math.sqrt(repeats)
        assert 0 < error < 0.05 * integral  # there is noise, and little enough to tell a wrong estimate
        assert (estimate.mean() - exact).abs() <= 3 * error


def test_given_probes_are_the_ones_that_are_used(tiny):
    tiny.requires_grad_(False)
    x, y = torch.randn(4, 4, 8, 8), torch.tensor([1, 2, 3, 4])
    options = {"sampling_method": "euler", "num_steps": 4, "probes": 2}
    whole = log_likelihood(Transport(), tiny, x, generator=torch.Generator().manual_seed(5), y=y, **options)
    noise = torch.randint(0, 2, (2, *x.shape), generator=torch.Generator().manual_seed(5)) * 2 - 1
    parts = [
        log_likelihood(Transport(), tiny, x[part], noise=noise[:, part], y=y[part], **options)
        for part in (slice(0, 1), slice(1, 4))  # a picture's value is its own, whatever it is batched with
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-3)
    other = log_likelihood(Transport(), tiny, x, noise=noise.flip(1), y=y, **options)
    assert ((other - whole).abs() > 1e-2).any()
    with pytest.raises(UserError, match=re.escape("noise: got (2, 4, 4, 8, 8), expected (3, 4, 4, 8, 8)")):
        log_likelihood(Transport(), tiny, x, noise=noise, y=y, **options | {"probes": 3})


def test_parameters_get_no_gradient(tiny):
    log_likelihood(
        Transport(), tiny, torch.randn(2, 4, 8, 8), sampling_method="euler", num_steps=3, y=torch.tensor([1, 2])
    )
    assert all(p.grad is None for p in tiny.parameters())


def test_bits_of_a_uniform_level_are_eight():
    log_p = torch.full((1,), 10 * math.log(1 / 2))  # uniform on [-1, 1], in ten dimensions
    assert bits_per_dim(log_p, 10).item() == pytest.approx(math.log2(255))


def test_a_level_is_spread_over_its_own_interval():
    levels = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(dequantize(levels, torch.full((256,), 0.5)), from_uint8(levels))
    torch.testing.assert_close(dequantize(levels[:-1], torch.ones(255)), dequantize(levels[1:], torch.zeros(255)))
    first, last = dequantize(levels, torch.zeros(256)).min(), dequantize(levels, torch.ones(256)).max()
    torch.testing.assert_close(torch.stack([first, last]), torch.tensor([-128 / 127.5, 128 / 127.5]))


def test_bits_of_levels_are_the_closed_forms_and_bound_the_codes_length():
    """Levels drawn from N(MEAN, STD²) rounded, under that Gaussian: the code's length is known, and the bound's."""
    torch.manual_seed(0)
    mean, std = 127.5 * (MEAN + 1), 127.5 * STD  # in levels
    levels = (mean + std * torch.randn(512, 1, 4, 4)).round()  # beyond 0 … 255 too, so that nothing is cut
    x = dequantize(levels, torch.rand(levels.shape)).double()
    tr = Transport()
    got = bits_per_dim(log_likelihood(tr, gaussian(tr), x, exact=True, rtol=1e-6), 16)
    centred = (levels.double() - mean) / std
    # E over u of -log2 N(l + u - ½; mean, std²): the interval's variance is 1/12
    bound = (0.5 * (centred**2 + 1 / 12 / std**2) + math.log(std * math.sqrt(2 * math.pi))) / math.log(2)
    normal = torch.distributions.Normal(0, 1)
    code = -(normal.cdf(centred + 0.5 / std) - normal.cdf(centred - 0.5 / std)).log2()
    assert (code <= bound + 1e-9).all()
    assert got.mean().item() == pytest.approx(bound.mean().item(), abs=1e-3)  # of 7.7
    assert got.mean().item() == pytest.approx(code.mean().item(), rel=0.01)


@pytest.mark.parametrize(
    ("option", "named"),
    [({"probes": 0}, "probes: got 0, expected a whole number of at least 1"), ({"num_steps": 1}, "num_steps: got 1")],
)
def test_a_wrong_option_is_named(option, named):
    with pytest.raises(UserError, match=re.escape(named)):
        log_likelihood(Transport(), None, torch.zeros(1, 1), **option)
