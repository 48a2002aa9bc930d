import re

import pytest
import torch

from sit_composer.choices import DIFFUSION_FORMS, LOSS_WEIGHTS, PATHS, PREDICTIONS
from sit_composer.interpolant import expand
from sit_composer.transport import Transport
from tests.helpers.gaussian import gaussian

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def test_every_reference_value(reference):
    ref = reference("transport")
    t, x0, x1, output = ref["t"], ref["x0"], ref["x1"], ref["model_output"]
    checked = 0
    for name, expected in ref.items():
        path, *rest = name.split("/")
        match rest:
            case ["diffusion", form]:
                got = Transport(path).diffusion(x0, t, form, 0.7)
            case [prediction, "ode_drift"]:
                got = Transport(path, prediction).velocity(lambda x, t: output, ref[f"{path}/xt"], t)
            case [prediction, "score"]:
                got = Transport(path, prediction).score(lambda x, t: output, ref[f"{path}/xt"], t)
            case [prediction, weight, "loss"]:
                got = Transport(path, prediction, None if weight == "none" else weight).loss(output, t, x0, x1)
            case [prediction, "interval", setting]:
                sde, evaluation, last = re.fullmatch(r"sde=(.),eval=(.),last_step=(.*)", setting).groups()
                interval = Transport(path, prediction).interval(sde == "1", evaluation == "1", "sigma", float(last))
                got = torch.tensor(interval, dtype=torch.float64)
            case _:  # an input, or x_t and u_t, which are the path's
                continue
        torch.testing.assert_close(got, expected, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
        checked += 1
    assert checked == 62


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("weight", [weight for weight in LOSS_WEIGHTS if weight is not None])
def test_weighted_losses_of_the_predictions_of_one_field_agree(path, weight, reference):
    """A velocity weight makes of every error the velocity's, and a likelihood weight the same part of a bound."""
    ref = reference("transport")
    t, x0, x1, velocity = ref["t"], ref["x0"], ref["x1"], ref["model_output"]
    interpolant = Transport(path).path
    xt = interpolant.interpolate(t, x0, x1)[0]
    outputs = {
        "velocity": velocity,
        "noise": interpolant.noise_from_velocity(velocity, xt, t),
        "score": interpolant.score_from_velocity(velocity, xt, t),
    }
    losses = [Transport(path, p, weight).loss(output, t, x0, x1) for p, output in outputs.items()]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-8, atol=1e-10)
    if weight == "velocity":
        te = expand(t, xt)  # x̂ = (σ v - σ̇ x) / W
        sigma, d_sigma = interpolant.sigma(te)
        data = (sigma * velocity - d_sigma * xt) / interpolant.wronskian(te)
        loss = Transport(path, "x", weight, t_eps=1e-9).loss(data, t, x0, x1)
        torch.testing.assert_close(loss, losses[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("weight", [None, "velocity"])
def test_the_loss_of_data_is_jits(weight):
    """Of data, or of velocities of which both have their denominator clamped (arXiv 2511.13720)."""
    t = torch.tensor([0.0, 0.3, 0.94, 0.97, 1.0], dtype=torch.float64)
    x0, x1, output = torch.randn(3, 5, 1, 2, 2, dtype=torch.float64)
    te = t.reshape(-1, 1, 1, 1)
    xt, below = te * x1 + (1 - te) * x0, (1 - te).clamp(min=0.05)
    errors = output - x1 if weight is None else (output - xt) / below - (x1 - xt) / below
    loss = Transport("Linear", "x", weight).loss(output, t, x0, x1)
    torch.testing.assert_close(loss, errors.square().mean((1, 2, 3)), **CLOSE)


@pytest.mark.parametrize("path", PATHS)
def test_an_x_network_has_no_pole_and_its_output_is_the_expected_data(path):
    tr = Transport(path, "x", "velocity")
    assert tr.interval() == Transport(path).interval()  # as a velocity network
    assert tr.interval(eval=True) == Transport(path).interval(eval=True)
    x, t = torch.randn(3, 1, 2, 2, dtype=torch.float64), torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    expected = gaussian(tr)(x, t)
    for prediction in PREDICTIONS:  # Tweedie's formula of the others
        other = Transport(path, prediction)
        torch.testing.assert_close(other.expected_data(gaussian(other), x, t), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_a_perfect_prediction_has_no_loss(path, prediction, reference):
    ref = reference("transport")
    t, x0, x1 = ref["t"], ref["x0"], ref["x1"]
    tr = Transport(path, prediction)
    outputs = {
        "velocity": tr.path.interpolate(t, x0, x1)[1],
        "noise": x0,
        "score": tr.path.score_from_noise(x0, t),
        "x": x1,
    }
    assert tr.loss(outputs[prediction], t, x0, x1).max() < 1e-20


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_an_eps_that_is_given_counts(path, prediction):
    tr = Transport(path, prediction, train_eps=0.1, sample_eps=0.2)
    start = 0.0 if path == "VP" else 0.1  # nothing is singular at VP's start
    assert tr.interval() == (start, 0.9)
    assert tr.interval(eval=True) == (2 * start, 0.8)
    assert tr.interval(sde=True, eval=True, last_step_size=0.04) == (2 * start, 0.96)
    only_sampling = Transport(path, prediction, sample_eps=0.2)
    assert only_sampling.interval() == Transport(path, prediction).interval()
    assert only_sampling.interval(eval=True)[1] == 0.8


def test_training_times_stay_in_the_interval():
    torch.manual_seed(0)
    times = []

    def model(x, t):
        times.append(t)
        return torch.zeros_like(x)

    Transport(train_eps=0.3).training_loss(model, torch.zeros(4096, 1, 1, 1))
    assert times[0].min() >= 0.3
    assert times[0].max() <= 0.7
    assert times[0].mean().item() == pytest.approx(0.5, abs=0.01)
    assert times[0].std().item() == pytest.approx(0.4 / 12**0.5, rel=0.05)


def test_logit_normal_times_have_the_quantiles_of_their_normal():
    torch.manual_seed(0)
    tr = Transport(train_eps=0.1, time_sampling="logit-normal", time_mean=0.5, time_std=2.0)
    t, _ = tr.draw(torch.zeros(20000, 1))
    assert t.min() >= 0.1
    assert t.max() <= 0.9
    for quantile, normal in ((0.1587, -1.0), (0.5, 0.0), (0.8413, 1.0)):
        expected = 0.1 + 0.8 * torch.sigmoid(torch.tensor(0.5 + 2.0 * normal)).item()
        assert torch.quantile(t, quantile).item() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
def test_a_time_shift_makes_the_noise_so_many_times_larger(sampling):
    u = torch.linspace(0, 1, 101)[1:-1]
    plain = Transport(time_sampling=sampling).times(u)
    shifted = Transport(time_sampling=sampling, time_shift=3.0).times(u)
    torch.testing.assert_close((1 - shifted) / shifted, 3 * (1 - plain) / plain)
    if sampling == "logit-normal":  # whose mean it moves
        mean = -torch.tensor(3.0).log().item()
        torch.testing.assert_close(shifted, Transport(time_sampling=sampling, time_mean=mean).times(u))


def test_a_shift_of_auto_is_that_of_the_dimensions_in_training_and_sampling():
    u = torch.linspace(0, 1, 101)
    auto = Transport(time_shift="auto", dims=768 * 16 * 16)
    assert (auto.shift, auto.sampling_shift) == (pytest.approx(6.9282), pytest.approx(6.9282))  # √48, as RAE's
    assert torch.equal(auto.times(u), Transport(time_shift=auto.shift).times(u))
    assert Transport(time_shift="auto", dims=4096).shift == 1
    assert Transport(time_shift=3.0).sampling_shift == 1  # a number is of training alone


def test_training_loss_is_one_number_a_sample_and_matches_its_expectation():
    """For data 0 and output 0 the velocity's target is -x0: the mean square is that of normal noise."""
    torch.manual_seed(0)
    loss = Transport().training_loss(lambda x, t: torch.zeros_like(x), torch.zeros(512, 4, 8, 8))
    assert loss.shape == (512,)
    assert loss.mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("form", DIFFUSION_FORMS)
def test_diffusion_is_one_number_a_sample(form):
    w = Transport().diffusion(torch.zeros(3, 4, 2, 2), torch.tensor([0.2, 0.5, 0.9]), form, 0.7)
    assert w.shape == (3, 1, 1, 1)
    assert (w >= 0).all()


def test_sbdm_keeps_off_the_noise_end_where_it_is_singular():
    assert Transport().interval(sde=True, eval=True, diffusion_form="SBDM")[0] > 0
    assert Transport("VP").interval(sde=True, eval=True, diffusion_form="SBDM")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"path_type": "linear"}, "path_type: got 'linear', expected Linear, GVP, VP"),
        ({"prediction": "data"}, "prediction: got 'data'"),
        ({"loss_weight": "snr"}, "loss_weight: got 'snr'"),
        ({"train_eps": 0.5}, "train_eps: got 0.5, expected a number in [0, 0.5)"),
        ({"sample_eps": -0.1}, "sample_eps: got -0.1"),
        ({"time_shift": "auto", "dims": 64, "sample_eps": 0.1}, "sample_eps: got 0.1, expected null beside time_shift"),
        (
            {"sample_eps": 0.0, "prediction": "noise"},
            "sample_eps: got 0, expected a number above 0, as Linear with prediction noise has a pole at t = 0",
        ),
        (
            {"sample_eps": 0.0, "path_type": "VP"},
            "sample_eps: got 0, expected a number above 0, as VP with prediction velocity has a pole at t = 1",
        ),
        (
            {"train_eps": 0.0, "prediction": "score", "loss_weight": "velocity"},
            "train_eps: got 0, expected a number above 0, as Linear with prediction score and loss_weight velocity has",
        ),
        ({"time_sampling": "cosine"}, "time_sampling: got 'cosine', expected uniform, logit-normal"),
        ({"time_mean": float("nan")}, "time_mean: got nan, expected a number"),
        ({"time_std": 0.0}, "time_std: got 0.0, expected a number above 0"),
        ({"time_shift": 0.0}, "time_shift: got 0.0, expected a number above 0, or auto"),
        ({"time_shift": "Auto"}, "time_shift: got Auto, expected a number above 0, or auto"),
        ({"time_shift": "auto"}, "dims: got None, expected the dimensions of a sample, as time_shift is auto"),
        ({"t_eps": 0.0}, "t_eps: got 0.0, expected a number in (0, 0.5)"),
        (
            {"prediction": "x", "loss_weight": "likelihood"},
            "loss_weight: got likelihood, expected None or velocity with prediction x",
        ),
    ],
)
def test_a_wrong_argument_is_named(arguments, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        Transport(**arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_times_noise_and_loss_of_half_precision_are_float32(dtype):
    tr, x1 = Transport(), torch.zeros(20000, 1, 1, 1, dtype=dtype)
    t, x0 = tr.draw(x1)
    assert (t.dtype, x0.dtype) == (torch.float32, torch.float32)
    assert len(t.unique()) > 19000

    def model(x, t):
        assert (x.dtype, t.dtype) == (dtype, torch.float32)
        return x

    assert tr.training_loss(model, x1).dtype == torch.float32
    half = x0[:5].to(dtype)
    assert tr.loss(half, t[:5].to(dtype), half, half).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_training_loss_is_the_loss_at_the_drawn_times_and_noise(dtype):
    tr, x1 = Transport("GVP", "noise"), torch.randn(8, 1, 4, 4).to(dtype)

    def model(x, t, scale):
        return scale * x

    torch.manual_seed(1)
    loss = tr.training_loss(model, x1, scale=0.5)
    torch.manual_seed(1)
    t, x0 = tr.draw(x1)
    assert torch.equal(loss, tr.loss_at(model, t, x0, x1, scale=0.5))
    xt = tr.path.interpolate(t, x0, x1)[0].to(dtype)
    assert torch.equal(loss, tr.loss((0.5 * xt).float(), t, x0, x1))
