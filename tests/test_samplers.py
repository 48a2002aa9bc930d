import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchdiffeq import odeint

from sit_composer.choices import (
    DIFFUSION_FORMS,
    FIXED_STEP_METHODS,
    LAST_STEPS,
    ODE_METHODS,
    PATHS,
    PREDICTIONS,
    SDE_METHODS,
)
from sit_composer.errors import UserError
from sit_composer.guidance import Guidance
from sit_composer.likelihood import log_likelihood
from sit_composer.samplers import Counted, fixed_steps, sample_ode, sample_sde
from sit_composer.transport import Transport, shift_times
from tests.helpers.gaussian import MEAN, STD, gaussian


@pytest.mark.parametrize("spec", ["ode_euler_linear", "ode_dopri5_linear_cfg4", "sde_euler_linear_sigma"])
def test_reference_batches(spec, tiny, reference, meta):
    spec = next(s for s in meta["samples"]["specs"] if s["name"] == spec)
    ref = reference("samples_tiny_a")
    z, y = ref["z"], ref["y"]
    tr = Transport(spec["path"], spec["prediction"])
    if spec["kind"] == "sde":
        torch.manual_seed(0)
        got = sample_sde(
            tr, tiny, z, sampling_method=spec["method"], diffusion_form=spec["form"], last_step=spec["last_step"],
            last_step_size=spec["last_step_size"], num_steps=spec["num_steps"], y=y,
        )  # fmt: skip
    elif "cfg_scale" in spec:  # as released: the batch twice, null labels behind
        doubled = {"y": torch.cat([y, torch.full_like(y, tiny.null_label)]), "cfg_scale": spec["cfg_scale"]}
        z = torch.cat([z, z])
        options = {"sampling_method": spec["method"], "num_steps": spec["num_steps"]}
        got = sample_ode(tr, tiny.forward_with_cfg, z, **options, **doubled)[: len(y)]
    else:
        got = sample_ode(tr, tiny, z, sampling_method=spec["method"], num_steps=spec["num_steps"], y=y)
    torch.testing.assert_close(got, ref[spec["name"]], rtol=1e-4, atol=1e-4)


def test_three_channel_guidance_draws_the_released_batch(tiny, reference):
    ref = reference("samples_tiny_a")
    got = sample_ode(Transport(), Guidance(tiny, 4.0, channels=3), ref["z"], num_steps=3, y=ref["y"])
    torch.testing.assert_close(got, ref["ode_dopri5_linear_cfg4"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ODE_METHODS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_ode_solver_maps_noise_to_the_gaussian(method, prediction):
    tr = Transport("Linear", prediction, t_eps=0.01)
    z = torch.randn(64, 1, 2, 2, dtype=torch.float64)
    x = sample_ode(tr, gaussian(tr), z, sampling_method=method, num_steps=400)
    # The flow between Gaussians is affine; the clamp of x leaves a little noise.
    torch.testing.assert_close(x, MEAN + STD * z, rtol=0, atol=0.04 if prediction == "x" else 0.02)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [51, 101, 251])
def test_no_fixed_step_solver_is_unstable_in_float32(prediction, steps):
    tr = Transport("Linear", prediction)
    z = torch.randn(64, 1, 2, 2)
    for method in FIXED_STEP_METHODS:
        x = sample_ode(tr, gaussian(tr), z, sampling_method=method, num_steps=steps)
        torch.testing.assert_close(x, MEAN + STD * z, rtol=0, atol=0.1)  # Euler, in 51 steps, is off by 0.05


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_of_half_precision_is_sampled_at_times_of_float32(path, prediction, dtype):
    tr = Transport(path, prediction)
    seen = set()

    def model(x, t):
        assert x.dtype == dtype
        seen.add(float(t[0]))
        return gaussian(tr)(x.float(), t).to(dtype)

    z = torch.randn(2000, 1, 2, 2).to(dtype)
    for x in (sample_ode(tr, model, z, sampling_method="heun", num_steps=250), sample_ode(tr, model, z)):
        assert x.dtype == dtype
        torch.testing.assert_close(x.float(), MEAN + STD * z.float(), rtol=0, atol=0.1)
    assert len(seen) > 249
    x, exact = sample_sde(tr, model, z).float(), sample_sde(tr, gaussian(tr), z.float())
    assert float(x.mean()) == pytest.approx(float(exact.mean()), abs=0.03)
    assert float(x.std()) == pytest.approx(float(exact.std()), abs=0.03)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ode_forward_then_reverse_returns_the_start(path, prediction):
    tr = Transport(path, prediction)
    z = torch.randn(8, 1, 2, 2, dtype=torch.float64)
    tight = {"atol": 1e-9, "rtol": 1e-9}
    x = sample_ode(tr, gaussian(tr), z, **tight)
    torch.testing.assert_close(sample_ode(tr, gaussian(tr), x, reverse=True, **tight), z, rtol=1e-5, atol=1e-5)
    if path == "VP":  # whose last step must not go past t = 1
        assert sample_ode(tr, gaussian(tr), z, num_steps=2).isfinite().all()


@pytest.mark.parametrize("prediction", ["velocity", "x"])
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2), ("heun3", 3)])
def test_measured_order_of_the_ode_solvers(method, order, prediction):
    tr = Transport("GVP", prediction, sample_eps=0.06)  # where σ is above t_eps
    z = torch.randn(16, 1, 2, 2, dtype=torch.float64)
    (mean, variance), (mean_of_data, variance_of_data) = law(tr, 0.06), law(tr, 0.94)
    exact = mean_of_data + math.sqrt(variance_of_data / variance) * (z - mean)
    errors = [
        (sample_ode(tr, gaussian(tr), z, sampling_method=method, num_steps=n + 1) - exact).abs().max()
        for n in (64, 128)
    ]
    assert torch.log2(errors[0] / errors[1]).item() == pytest.approx(order, abs=0.15)


def law(tr: Transport, t: float) -> tuple[float, float]:
    """Mean and variance of p_t for data ~ N(MEAN, STD²)."""
    t = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = tr.path.alpha(t)[0].item(), tr.path.sigma(t)[0].item()
    return alpha * MEAN, alpha**2 * STD**2 + sigma**2


def law_of_samples(tr: Transport, steps: int, **options) -> tuple[float, float]:
    """Mean and variance of what sample_sde makes of z ~ p_t0, exactly.

    The field of a Gaussian is affine in x, and so is a sample in z and in each step's noise. What stands before them
    is read off a batch: nothing, z = 1, and each step's noise = 1.
    """
    z = torch.zeros(steps + 2, 1, dtype=torch.float64)
    z[1] = 1
    noises = iter(torch.eye(steps + 2, dtype=z.dtype)[2:, :, None])
    x = sample_sde(tr, gaussian(tr), z, num_steps=steps + 1, draw=lambda: next(noises), **options)[:, 0]
    assert next(noises, None) is None  # each step drew once
    form, last = options.get("diffusion_form", "sigma"), options["last_step"]
    size = 0.0 if last is None else options["last_step_size"]
    mean, variance = law(tr, tr.interval(sde=True, eval=True, diffusion_form=form, last_step_size=size)[0])
    factors = x[1:] - x[0]
    return (x[0] + factors[0] * mean).item(), (factors[0] ** 2 * variance + factors[1:].square().sum()).item()


@pytest.mark.parametrize(("method", "orders"), [("Euler", (1, 1)), ("Heun", (2, 1))])
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize("path", PATHS)
def test_measured_order_of_the_sde_solvers(path, form, method, orders):
    """Of mean and variance. Heun adds a step's noise at its start, which leaves the variance an order behind."""
    tr = Transport(path, sample_eps=0.2)  # far from SBDM's pole, where the order shows only at very small steps
    errors = []
    for steps in (128, 256):
        got = law_of_samples(tr, steps, sampling_method=method, diffusion_form=form, last_step=None)
        errors.append([abs(g - exact) for g, exact in zip(got, law(tr, 0.8), strict=True)])
    (mean, variance), (mean_finer, variance_finer) = errors
    assert variance_finer < 0.01
    assert math.log2(variance / variance_finer) == pytest.approx(orders[1], abs=0.15)
    if path == "Linear":  # whose mean flows in a straight line, at a constant speed: any solver has it
        assert mean < 1e-12
    else:
        assert math.log2(mean / mean_finer) == pytest.approx(orders[0], abs=0.15)


@pytest.mark.parametrize(
    ("last_step", "form", "order"),
    [
        ("Mean", "sigma", 2),
        ("Mean", "constant", 1),  # it leaves out noise of variance 2wh, which only a w -> 0 makes small
        ("Euler", "sigma", 2),
        ("Euler", "constant", 2),
        ("Tweedie", "sigma", 2),  # E[x₁ | x] has the variance of x₁ less that of x₁ given x, which is near σ²
        ("Tweedie", "constant", 2),
    ],
)
def test_measured_order_of_the_last_steps(last_step, form, order):
    """Of the variance, in the last step's size. On the Linear path the mean has no error."""
    tr = Transport("Linear")
    errors = []
    for size in (0.04, 0.02):
        options = {"diffusion_form": form, "last_step": last_step, "last_step_size": size}
        (mean, coarse), (_, fine) = (law_of_samples(tr, steps, **options) for steps in (512, 1024))
        assert mean == pytest.approx(MEAN, abs=1e-12)
        errors.append(abs(2 * fine - coarse - STD**2))  # extrapolated: without the first order's error of the steps
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sampler", [sample_ode, sample_sde])
def test_the_predictions_of_one_field_give_the_same_samples(path, sampler):
    z = torch.randn(16, 1, 2, 2, dtype=torch.float64)
    samples = []
    for prediction in PREDICTIONS:
        tr = Transport(path, prediction, sample_eps=1e-3, t_eps=1e-4)  # the same interval for all, and no clamp
        torch.manual_seed(0)
        method = {"sampling_method": "midpoint"} if sampler is sample_ode else {}  # as heun ends differently for x
        samples.append(sampler(tr, gaussian(tr), z, num_steps=50, **method))
    for other in samples[1:]:
        torch.testing.assert_close(other, samples[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", SDE_METHODS)
@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_every_sde_is_finite(path, prediction, form, last_step, method):
    tr = Transport(path, prediction)
    z = torch.randn(4, 1, 2, 2)
    options = {"sampling_method": method, "diffusion_form": form, "last_step": last_step, "num_steps": 20}
    assert sample_sde(tr, gaussian(tr), z, **options).isfinite().all()


@pytest.mark.parametrize("method", SDE_METHODS)
@pytest.mark.parametrize("form", ["sigma", "linear", "increasing-decreasing"])
def test_sde_samples_have_the_gaussians_mean_and_deviation(method, form):
    torch.manual_seed(0)
    tr = Transport()
    x = sample_sde(tr, gaussian(tr), torch.randn(20000, 1), sampling_method=method, diffusion_form=form)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert x.std().item() == pytest.approx(STD, abs=0.025)


@pytest.mark.parametrize("method", ["euler", "heun2"])
@pytest.mark.parametrize("steps", [1, 7])
def test_our_fixed_steps_have_torchdiffeqs_bits(method, steps):
    """Earlier versions took these from torchdiffeq; their images stay as they are."""
    x, times = torch.randn(5, 3), torch.linspace(0.001, 1, steps + 1)

    def drift(t, x):
        return torch.sin(3 * x) + t * x

    expected = odeint(drift, x, times, method=method)[-1]
    assert torch.equal(fixed_steps(drift, x, times, method != "euler"), expected)


@given(st.floats(0.05, 20), st.floats(0, 1))
def test_shifted_times_keep_their_ends_and_the_inverse_shift_moves_them_back(shift, u):
    times = torch.tensor([0, u, 1], dtype=torch.float64)
    moved = shift_times(times, shift)
    assert moved[[0, 2]].tolist() == [0, 1]
    assert (moved[1] <= u) if shift >= 1 else (moved[1] >= u)
    if 0 < u < 1:  # σ/α of the linear path grows by the shift
        assert ((1 - moved[1]) / moved[1]).item() == pytest.approx(shift * (1 - u) / u, rel=1e-9)
    torch.testing.assert_close(shift_times(moved, 1 / shift), times)


class Recorded(Counted):
    """A model that notes its times."""

    def __init__(self, model, times: list[float]):
        super().__init__(model)
        self.times = times

    def __call__(self, x, t):
        self.times.append(t[0].item())
        return super().__call__(x, t)


@pytest.mark.parametrize("shift", [0.4, 3.0])
def test_shifted_steps_keep_the_solvers_order_and_go_back_the_way_they_came(shift):
    tr = Transport("GVP")
    z = torch.randn(16, 1, 2, 2, dtype=torch.float64)
    errors = []
    for steps in (64, 128):
        there, back = [], []
        options = {"sampling_method": "heun", "num_steps": steps + 1, "time_shift": shift}
        x = sample_ode(tr, Recorded(gaussian(tr), there), z, **options)
        errors.append((x - MEAN - STD * z).abs().max().item())
        sample_ode(tr, Recorded(gaussian(tr), back), x, reverse=True, **options)
        moved = shift_times(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift).tolist()
        assert there[::2] == pytest.approx(moved[:-1], abs=1e-12)  # where steps begin
        assert back[1::2] == pytest.approx(moved[-2::-1], abs=1e-12)  # where they end
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("shift", [0.4, 3.0])
def test_shifted_steps_of_the_sde_keep_its_order(shift):
    tr = Transport("Linear", sample_eps=0.2)
    errors = []
    for steps in (128, 256):
        mean, variance = law_of_samples(tr, steps, last_step=None, time_shift=shift)
        assert mean == pytest.approx(law(tr, 0.8)[0], abs=1e-12)
        errors.append(abs(variance - law(tr, 0.8)[1]))
    assert errors[1] < 0.01
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.15)


def test_the_last_step_to_the_data_takes_the_x_of_a_network_that_predicts_it():
    """In JiT's sampler the last step is Euler's: it ends at the network's own x, and divides nothing by t_eps."""
    tr, seen = Transport(prediction="x"), []

    def model(x, t):
        seen.append((t[0].item(), gaussian(tr)(x, t)))
        return seen[-1][1]

    z = torch.randn(8, 1, 2, 2, dtype=torch.float64)
    x = sample_ode(tr, model, z, sampling_method="heun", num_steps=11)
    assert len(seen) == 19
    assert seen[-1][0] == pytest.approx(0.9)
    torch.testing.assert_close(x, seen[-1][1], rtol=1e-12, atol=1e-12)


def test_without_a_shift_samplers_take_the_transports():
    z = torch.randn(8, 1, 2, 2)
    auto = Transport(time_shift="auto", dims=16 * 4096)
    for sampler in (sample_ode, sample_sde):
        ends = []
        for tr, options in ((auto, {}), (Transport(), {"time_shift": 4.0}), (Transport(time_shift=4.0), {})):
            torch.manual_seed(0)
            method = "heun" if sampler is sample_ode else "Heun"
            ends.append(sampler(tr, gaussian(tr), z, sampling_method=method, num_steps=5, **options))
        assert torch.equal(ends[0], ends[1])
        assert not torch.equal(ends[0], ends[2])  # a number is of training alone


def test_evaluations_are_counted():
    tr = Transport()
    counts = {}
    for method in ("euler", "heun"):
        model = Counted(gaussian(tr))
        sample_ode(tr, model, torch.zeros(1, 1), sampling_method=method, num_steps=11)
        counts[method] = model.evaluations
    assert counts == {"euler": 10, "heun": 20}


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda tr: sample_ode(tr, None, torch.zeros(1), sampling_method="Euler"), "sampling_method: got 'Euler'"),
        (
            lambda tr: sample_ode(tr, None, torch.zeros(1), num_steps=1),
            "num_steps: got 1, expected a whole number of at",
        ),
        (
            lambda tr: sample_ode(tr, None, torch.zeros(1), atol=0, rtol=0),
            "atol: got 0, and rtol too, expected a number",
        ),
        (
            lambda tr: sample_ode(tr, None, torch.zeros(1), time_shift=0.0),
            "time_shift: got 0.0, expected a number above",
        ),
        (lambda tr: sample_ode(tr, None, torch.zeros(1), rtol=-1), "rtol: got -1, expected a number of at least 0"),
        (lambda tr: sample_sde(tr, None, torch.zeros(1), sampling_method="euler"), "sampling_method: got 'euler'"),
        (lambda tr: sample_sde(tr, None, torch.zeros(1), last_step_size=1.5), "last_step_size: got 1.5, expected"),
        (lambda tr: sample_sde(tr, None, torch.zeros(1), diffusion_form="none"), "diffusion_form: got 'none'"),
    ],
)
def test_a_wrong_option_is_named(call, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        call(Transport())


@pytest.mark.parametrize("solve", [sample_ode, log_likelihood])
def test_a_solver_that_gives_up_says_what_to_do(solve):
    tr = Transport()
    with pytest.raises(UserError, match=r"the solver gave up \(underflow in dt .*\); try a larger atol or rtol"):
        solve(tr, gaussian(tr), torch.randn(2, 1), atol=1e-30, rtol=1e-30)
