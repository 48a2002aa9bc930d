"""The metrics against closed forms, and against implementations that share no code with them."""

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torchmetrics.image.kid import poly_mmd

from sit_composer.evaluation.metrics import frechet_distance, inception_score, kid, precision_recall, statistics


def draw(seed: int, n: int, d: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """Correlated features; sets of one d share no linear map."""
    rng = np.random.default_rng((seed, n, d))
    return (rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * scale / np.sqrt(d) + shift).astype(np.float32)


def rotation(seed: int, d: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def test_statistics_are_mean_and_unbiased_covariance():
    mu, sigma = statistics(np.array([[0, 1], [2, 5]], dtype=np.float32))
    assert mu.tolist() == [1, 3]
    assert sigma.tolist() == [[2, 4], [4, 8]]
    assert sigma.dtype == np.float64
    assert statistics(np.array([[0.0], [2.0]]))[1].tolist() == [[2]]


def test_frechet_distance_of_gaussians_is_the_closed_form():
    # Covariances that commute: the sum of (√a - √b)², in any basis.
    rng = np.random.default_rng(0)
    a, b, mu1, mu2 = (rng.uniform(0.1, 3, 12) for _ in range(4))
    basis = rotation(1, 12)
    expected = np.sum((mu1 - mu2) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert frechet_distance(mu1, basis * a @ basis.T, mu2, basis * b @ basis.T) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(4 + 1)


def test_frechet_distance_agrees_with_scipys_root_and_with_torch_fidelity():
    one, two = statistics(draw(1, 500, 40)), statistics(draw(2, 400, 40, shift=0.3, scale=1.5))
    root = scipy.linalg.sqrtm(one[1] @ two[1]).real
    expected = np.sum((one[0] - two[0]) ** 2) + np.trace(one[1] + two[1] - 2 * root)
    ours = frechet_distance(*one, *two)
    assert ours == pytest.approx(expected, rel=1e-8)
    theirs = fid_statistics_to_metric(*({"mu": mu, "sigma": sigma} for mu, sigma in (one, two)), verbose=False)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-8)


def test_frechet_distance_is_exact_with_fewer_pictures_than_features():
    x, y = draw(3, 12, 200), draw(4, 15, 200, scale=2)
    # The trace of the root by way of the features themselves, of which there are few.
    a, b = ((f - f.mean(0, dtype=np.float64)) / np.sqrt(len(f) - 1) for f in (x, y))
    cross = scipy.linalg.svdvals(a @ b.T).sum()
    one, two = statistics(x), statistics(y)
    expected = np.sum((one[0] - two[0]) ** 2) + np.sum(a**2) + np.sum(b**2) - 2 * cross
    assert frechet_distance(*one, *two) == pytest.approx(expected, rel=1e-10)
    # Why torch-fidelity's is not used: with its eigenvalues, a set isn't at 0 from itself.
    theirs = fid_statistics_to_metric(*[{"mu": one[0], "sigma": one[1]}] * 2, verbose=False)
    assert abs(theirs["frechet_inception_distance"]) > 1e-9 * np.trace(one[1])
    assert frechet_distance(*one, *one) < 1e-9 * np.trace(one[1])


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    d=st.integers(1, 12),
    n=st.integers(2, 20),
    m=st.integers(2, 20),
    c=st.floats(0.1, 10),
)
def test_frechet_distance_is_a_distance_of_distributions(seed, d, n, m, c):
    x, y = draw(seed, n, d).astype(np.float64), draw(seed + 1, m, d, shift=0.5).astype(np.float64)

    def distance(x: np.ndarray, y: np.ndarray) -> float:
        return frechet_distance(*statistics(x), *statistics(y))

    size = np.trace(statistics(x)[1]) + np.trace(statistics(y)[1]) + 1
    close = {"abs": 1e-6 * size}
    there = distance(x, y)
    assert there >= 0
    assert distance(x, x) == pytest.approx(0, **close)
    assert distance(x[::-1], x) == pytest.approx(0, **close)
    assert distance(y, x) == pytest.approx(there, **close)
    assert distance(x + c, y + c) == pytest.approx(there, **close)
    basis = rotation(seed, d)
    assert distance(x @ basis, y @ basis) == pytest.approx(there, **close)
    assert distance(c * x, c * y) / c**2 == pytest.approx(there, **close)
    moved = x + np.linspace(0, c, d)
    assert distance(x, moved) == pytest.approx(np.sum(np.linspace(0, c, d) ** 2), abs=1e-6 * (size + c**2 * d))


def test_inception_score_of_known_predictions():
    assert inception_score(np.zeros((100, 8))) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    certain = 1000 * np.eye(8)[np.arange(800) % 8]  # no split has exactly equal parts
    assert inception_score(certain, splits=1)[0] == pytest.approx(8)
    assert 7.5 < inception_score(certain)[0] < 8
    # Where no class but one is ever predicted, torch-fidelity gives NaN.
    assert inception_score(1000 * np.eye(8)[np.zeros(80, dtype=int)])[0] == pytest.approx(1)


def test_inception_score_is_not_fooled_by_the_order_of_the_samples():
    by_class = 1000 * np.eye(10)[np.repeat(np.arange(10), 100)]
    assert inception_score(by_class)[0] > 9  # unshuffled, each of ten splits has one class, and scores 1


def test_inception_score_agrees_with_its_formula_and_with_torch_fidelity():
    logits = np.random.default_rng(5).normal(size=(300, 20)) * 3
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = np.exp(np.mean([scipy.special.rel_entr(row, p.mean(axis=0)).sum() for row in p]))
    assert inception_score(logits, splits=1)[0] == pytest.approx(expected, rel=1e-9)
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=10)
    assert inception_score(logits) == pytest.approx(tuple(theirs.values()), rel=1e-9)


def test_kid_agrees_with_torchmetrics_and_with_its_sum():
    x, y = draw(6, 60, 30), draw(7, 60, 30, shift=0.2)
    mean, deviation = kid(x, y, subsets=3)  # each subset is the whole set
    theirs = poly_mmd(torch.from_numpy(x).double(), torch.from_numpy(y).double(), degree=3, gamma=None, coef=1.0)
    assert mean == pytest.approx(theirs.item(), rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-12)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a.astype(float) @ b) / 30 + 1) ** 3

    pairs = [(i, j) for i in range(60) for j in range(60)]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j) / (60 * 59)
    assert mean == pytest.approx(within - 2 * np.mean([kernel(x[i], y[j]) for i, j in pairs]), rel=1e-9)


def test_kid_of_one_distribution_is_0_on_average_and_repeats():
    x = draw(8, 2000, 10)
    drawn = [kid(*np.split(x[np.random.default_rng(i).permutation(2000)], 2), 10, 200)[0] for i in range(6)]
    error = np.std(drawn) / np.sqrt(len(drawn))
    assert abs(np.mean(drawn)) < 4 * error + 1e-12
    x, y = draw(8, 200, 10), draw(9, 200, 10, shift=1)
    assert kid(x, y, 5, 50) == kid(x, y, 5, 50)
    assert kid(x, y, 5, 50)[0] > 10 * abs(kid(x, x, 5, 50)[0])


@pytest.mark.parametrize("block", [7, 1000])
def test_precision_and_recall_agree_with_a_search_for_neighbours(block):
    fake, real = draw(10, 120, 6), draw(11, 90, 6, scale=1.3)

    def covered(points: np.ndarray, by: np.ndarray) -> float:
        radii = NearestNeighbors(n_neighbors=4, algorithm="brute").fit(by).kneighbors(by)[0][:, 3]  # the 1st is itself
        return np.mean([np.any(np.linalg.norm(by - p, axis=1) <= radii) for p in points])

    expected = covered(fake, real), covered(real, fake)
    assert 0 < expected[0] < 1
    assert expected[0] != expected[1]
    assert precision_recall(fake, real, block=block) == pytest.approx(expected, abs=1e-6)


def test_precision_and_recall_of_a_set_with_itself_are_1():
    x = draw(12, 50, 20) + 1000
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 1e4) == (0, 0)


def test_precision_and_recall_heed_distances_not_where_the_features_are():
    x, y = draw(10, 120, 6).astype(np.float64), draw(11, 90, 6, scale=1.3).astype(np.float64)
    assert precision_recall(x + 1e8, y + 1e8) == precision_recall(x, y)  # uncentred, the distances would be noise


def test_precision_is_of_the_generated_and_recall_of_the_real():
    real = draw(13, 200, 5)
    fake = real[np.argsort(real[:, 0])[:40]]  # those at one end: faithful, not diverse
    precision, recall = precision_recall(fake, real)
    assert precision == 1
    assert recall < 0.9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: statistics(x[:1]), "at least 2 rows"),
        (lambda x: inception_score(x[:9]), "at least 10 rows"),
        (lambda x: kid(x, x[:1]), "at least 2 rows"),
        (lambda x: precision_recall(x[:3], x), "at least 4 rows"),
        (lambda x: statistics(x[0]), r"got shape \(3,\)"),
        (lambda x: statistics(x * np.nan), "not finite"),
        (lambda x: frechet_distance(x[0], np.eye(3), x[0], np.eye(2)), "must fit"),
        (lambda x: frechet_distance(x[0], np.eye(3), x[0] * np.nan, np.eye(3)), "not finite"),
    ],
)
def test_what_is_no_set_of_features_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(draw(14, 20, 3))
