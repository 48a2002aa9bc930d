"""Power functions' averages against EDM2's own numbers, and against sums and integrals of the profiles."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sit_composer.averages import combine, decay_at, exponent, inner_product

# What EDM2's training/phema.py (github.com/NVlabs/edm2 at 4bf8162) gives: std_to_exp, power_function_beta with t_delta
# 1, power_function_correlation, and solve_posthoc_coefficients for snapshots at 100, 200, 300, 400, each with the stds
# 0.05 and 0.1, and an output at 400.
EXPONENTS = {0.01: 96.99489782370986, 0.05: 16.972198602303447, 0.1: 6.937203937601809, 0.15: 3.5578687748994646,
             0.2: 1.8262137798958404, 0.28: 0.16934399376949866}  # fmt: skip
DECAYS = {(0.05, 1): 0.0, (0.05, 2): 3.888921105204215e-06, (0.05, 10): 0.15053493247717484,
          (0.05, 1000): 0.9821795062966565, (0.1, 1): 0.0, (0.1, 2): 0.004080031659650188,
          (0.1, 10): 0.4333247206821348, (0.1, 1000): 0.9920902726450789}  # fmt: skip
PRODUCTS = {(100, 0.05, 100, 0.05): 0.09243253523859764, (100, 0.05, 400, 0.1): 9.533063886440162e-07,
            (400, 0.1, 100, 0.05): 9.533063886440162e-07, (300, 0.1, 200, 0.1): 0.0008476043203148811}  # fmt: skip
COEFFICIENTS = {
    0.03: [-2.976701343407225e-15, 1.7184608813025309e-12, -1.7141048223535046e-07, 5.591345379200612e-06,
           -0.011688932260618368, 0.12350327365081916, 2.1011045520605562, -1.2129243133873693],
    0.075: [5.546456340553366e-08, -9.914806777199194e-07, 0.0001308978315482456, -0.0007879841738916869,
            0.011581696005781643, -0.044665048581277504, 0.33642415793662206, 0.6973172169973315],
    0.15: [-0.0005620351079424068, 0.0019440693037546355, -0.013147865594997853, 0.03801996663552524,
           -0.0779583721502103, 0.2004086400796236, -0.2640619707998659, 1.115357567634113],
    0.25: [-0.03577511234058547, 0.08893159336580918, -0.11643675977919955, 0.2726891806085409,
           -0.20886245421699326, 0.47039608459213583, -0.29088766677678995, 0.8199451345470824],
}  # fmt: skip
TIMES, PAIR = [100, 100, 200, 200, 300, 300, 400, 400], [0.05, 0.1]
STDS = st.floats(0.01, 0.28)


@pytest.mark.parametrize("std", EXPONENTS)
def test_exponents_are_the_published_ones(std):
    assert exponent(std) == pytest.approx(EXPONENTS[std], rel=1e-10)


@pytest.mark.parametrize(("std", "batch"), DECAYS)
def test_decays_are_the_published_ones(std, batch):
    assert decay_at(f"power{std}", batch) == pytest.approx(DECAYS[std, batch], rel=1e-10)
    assert decay_at("0.999", batch) == 0.999


@pytest.mark.parametrize("case", PRODUCTS)
def test_inner_products_are_the_published_ones(case):
    end, std, other, other_std = (np.array([float(x)]) for x in case)
    found = inner_product(end, np.array([exponent(*std)]), other, np.array([exponent(*other_std)]))
    assert found[0] == pytest.approx(PRODUCTS[case], rel=1e-10)


@pytest.mark.parametrize("std", COEFFICIENTS)
def test_coefficients_are_the_published_ones(std):
    assert combine(TIMES, PAIR * 4, std)[0] == pytest.approx(COEFFICIENTS[std], rel=1e-6, abs=1e-12)


@given(STDS)
def test_a_profile_has_the_std_of_its_name(std):
    t = (np.arange(200_000) + 0.5) / 200_000
    p = t ** exponent(std)
    mean = np.average(t, weights=p)
    assert np.sqrt(np.average((t - mean) ** 2, weights=p)) == pytest.approx(std, rel=1e-3)


@given(STDS, st.integers(1, 300))
def test_decays_give_each_batch_the_integral_of_the_profile_over_it(std, last):
    shares = np.zeros(last)
    for batch in range(1, last + 1):
        decay = decay_at(f"power{std}", batch)
        shares *= decay
        shares[batch - 1] += 1 - decay
    edges = (np.arange(last + 1) / last) ** (exponent(std) + 1)  # the integral of the profile up to each batch
    assert shares == pytest.approx(np.diff(edges), abs=1e-12)
    assert shares.sum() == pytest.approx(1)


@given(st.lists(st.integers(1, 10_000), min_size=2, max_size=12, unique=True), STDS)
def test_coefficients_have_the_sum_one_and_more_averages_are_no_worse(times, std):
    pairs = list(itertools.product(sorted(times), PAIR))
    few, off = combine([t for t, _ in pairs[-2:]], PAIR, std)
    found, less_off = combine([t for t, _ in pairs], [s for _, s in pairs], std)
    assert few.sum() == pytest.approx(1)
    assert found.sum() == pytest.approx(1)
    assert less_off <= off * 1.1 + 1e-6  # least squares, but for the sum, which is set to 1 afterwards


@pytest.mark.parametrize("std", PAIR)
def test_an_average_that_is_there_is_its_own_reconstruction(std):
    found, off = combine(TIMES, PAIR * 4, std)
    assert found == pytest.approx([0] * 6 + [float(std == one) for one in PAIR], abs=1e-10)
    assert off < 1e-6


@pytest.mark.parametrize("std", [0.03, 0.07, 0.15, 0.22])
def test_what_is_made_afterwards_is_close_to_what_tracking_gives(std):
    """Of a random walk, and as close as the profile that the error tells."""
    walk = np.random.default_rng(0).normal(size=(2400, 50)).cumsum(0)
    names = [*(f"power{one}" for one in PAIR), f"power{std}"]
    averages, snapshots = np.zeros((3, 50)), []
    for batch, weights in enumerate(walk, 1):
        decays = np.array([decay_at(name, batch) for name in names])[:, None]
        averages = decays * averages + (1 - decays) * weights
        if batch % 100 == 0:
            snapshots += [averages[0], averages[1]]
    times = np.repeat(range(100, 2401, 100), 2).tolist()
    coefficients, off = combine(times, PAIR * 24, std)
    made, tracked = coefficients @ snapshots, averages[2]
    span = np.abs(tracked - averages[0]).mean()  # how far averages are apart
    assert np.abs(made - tracked).mean() < 0.1 * span
    assert 0 < off < 0.2
    worse = combine(times[-4:], PAIR * 2, std)[0] @ snapshots[-4:]
    assert np.abs(made - tracked).mean() < np.abs(worse - tracked).mean()
