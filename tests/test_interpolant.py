import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sit_composer.choices import PATHS
from sit_composer.interpolant import make_path

times = st.floats(0.01, 0.99)
values = st.lists(st.floats(-3, 3), min_size=3, max_size=3)
paths = st.sampled_from(sorted(PATHS))


@pytest.mark.parametrize("name", PATHS)
def test_reference_values_of_xt_and_ut(name, reference):
    ref = reference("transport")
    xt, ut = make_path(name).interpolate(ref["t"], ref["x0"], ref["x1"])
    torch.testing.assert_close(xt, ref[f"{name}/xt"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ut, ref[f"{name}/ut"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_are_autograds(name):
    path = make_path(name)
    for coefficient in (path.alpha, path.sigma):
        t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
        value, derivative = coefficient(t)
        (expected,) = torch.autograd.grad(value.sum(), t)
        torch.testing.assert_close(derivative, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_a_path_ends_at_the_data(name):
    path, one = make_path(name), torch.ones(1, dtype=torch.float64)
    assert path.alpha(one)[0].item() == pytest.approx(1)
    assert path.sigma(one)[0].item() == pytest.approx(0, abs=1e-15)
    if path.facts.pole_at_noise:
        assert path.alpha(0 * one)[0].item() == 0
    assert path.sigma(0 * one)[0].item() == pytest.approx(1, abs=1e-4)


@given(paths, times, values, values)
def test_velocity_score_velocity_is_the_identity(name, t, v, x):
    path = make_path(name)
    t, v, x = (torch.tensor(a, dtype=torch.float64).reshape(1, -1) for a in ([t], v, x))
    back = path.velocity_from_score(path.score_from_velocity(v, x, t[:, 0]), x, t[:, 0])
    torch.testing.assert_close(back, v, rtol=1e-9, atol=1e-9)


@given(paths, times, values, values)
def test_velocity_noise_velocity_is_the_identity(name, t, v, x):
    path = make_path(name)
    t, v, x = (torch.tensor(a, dtype=torch.float64).reshape(1, -1) for a in ([t], v, x))
    back = path.velocity_from_noise(path.noise_from_velocity(v, x, t[:, 0]), x, t[:, 0])
    torch.testing.assert_close(back, v, rtol=1e-9, atol=1e-9)


@given(paths, times, values, values)
def test_velocity_data_velocity_is_the_identity_and_noise_and_score_agree(name, t, v, x):
    path = make_path(name)
    t, v, x = (torch.tensor(a, dtype=torch.float64).reshape(1, -1) for a in ([t], v, x))
    t = t[:, 0]
    sigma, d_sigma = path.sigma(t)
    data = (sigma * v - d_sigma * x) / path.wronskian(t)
    close = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(path.velocity_from_data(data, x, t), v, **close)
    torch.testing.assert_close(path.noise_from_data(data, x, t), path.noise_from_velocity(v, x, t), **close)
    torch.testing.assert_close(path.score_from_data(data, x, t), path.score_from_velocity(v, x, t), **close)


@given(times, values, values, st.floats(0.01, 0.4))
def test_the_velocity_of_data_is_jits_on_straight_lines(t, data, x, floor):
    """As in denoiser.py of JiT (arXiv 2511.13720), with the denominator's clamp: v = (x̂ - x) / max(1 - t, t_eps)."""
    path = make_path("Linear")
    t, data, x = (torch.tensor(a, dtype=torch.float64).reshape(1, -1) for a in ([t], data, x))
    expected = (data - x) / max(1 - t.item(), floor)
    torch.testing.assert_close(path.velocity_from_data(data, x, t[:, 0], floor), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["Linear", "GVP"])
def test_a_floor_leaves_no_pole_at_the_data(name):
    path, one = make_path(name), torch.ones(1)
    data, x = torch.randn(1, 4), torch.randn(1, 4)
    for convert in (path.velocity_from_data, path.noise_from_data, path.score_from_data):
        assert convert(data, x, one, 0.05).isfinite().all()
        assert convert(data, data, one, 0.05).abs().max() < 1e-4 / 0.05  # at the data itself there is nothing left


@given(paths, times, values, values)
def test_noise_and_score_of_a_known_pair_are_recovered(name, t, x0, x1):
    path = make_path(name)
    t, x0, x1 = torch.tensor([t], dtype=torch.float64), *(torch.tensor([a], dtype=torch.float64) for a in (x0, x1))
    xt, ut = path.interpolate(t, x0, x1)
    torch.testing.assert_close(path.noise_from_velocity(ut, xt, t), x0, rtol=1e-8, atol=1e-8)
    sigma = path.sigma(t)[0]
    torch.testing.assert_close(path.score_from_noise(x0, t), -x0 / sigma, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(path.score_from_velocity(ut, xt, t), -x0 / sigma, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(path.velocity_from_data(x1, xt, t), ut, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(path.noise_from_data(x1, xt, t), x0, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["Linear", "GVP"])
def test_the_score_is_finite_where_the_release_divides_by_zero(name):
    path, t = make_path(name), torch.zeros(1)
    x = torch.randn(1, 4)
    torch.testing.assert_close(path.score_from_velocity(torch.randn(1, 4), x, t), -x)  # p_0 = N(0, I)


def test_the_diffusion_of_vp_is_finite_at_the_data_and_what_it_is_elsewhere():
    path, t = make_path("VP"), torch.linspace(0, 1, 101, dtype=torch.float64)
    assert float(path.score_variance(t)[-1]) == 0.05  # beta_min / 2
    general = path.sigma(t)[0] * path.wronskian(t) / path.alpha(t)[0]
    torch.testing.assert_close(path.score_variance(t)[:-1], general[:-1], rtol=1e-12, atol=0)
