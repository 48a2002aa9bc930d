"""Distances between generated and real images, on their features: float arrays (N, D), one row per image.

KID, precision and recall are torch-fidelity's, in float64. The Fréchet distance and the Inception Score are our own:
theirs lose digits with fewer images than features, and give NaN for a class that is never predicted.
"""

import numpy as np
import torch
from scipy.special import log_softmax, logsumexp
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_part

SEED = 2020  # of every shuffle and subset, as in torch-fidelity
IS_SPLITS = 10
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3
STATISTICS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # names in a file: mean, covariance


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean (D,) and the covariance (D, D), with N - 1 in its denominator, of N >= 2 feature vectors: float64."""
    _check(features, 2, "a covariance")
    return features.mean(axis=0, dtype=np.float64), np.atleast_2d(np.cov(features, rowvar=False, dtype=np.float64))


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½): FID, eq. 6 of Heusel et al. 2017 (arXiv 1706.08500).

    The squared 2-Wasserstein distance of two Gaussians (Dowson & Landau 1982), for mean (D,) and covariance (D, D).
    The trace of the root is the sum of the singular values of Σ₁^½ Σ₂^½. Unlike the root, or the eigenvalues, of the
    unsymmetric Σ₁Σ₂, these are exact to rounding even if a covariance is singular, that is for N <= D images.
    """
    given = mu1, sigma1, mu2, sigma2 = [np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2)]
    shapes = [a.shape for a in given]
    if shapes != [(mu1.size,), (mu1.size, mu1.size)] * 2:
        raise ValueError(f"mean (D,) and covariance (D, D) of both sets must fit: got {', '.join(map(str, shapes))}")
    if not all(np.isfinite(a).all() for a in given):
        raise ValueError("a mean or covariance has numbers that are not finite")
    cross = np.linalg.svd(_root(sigma1) @ _root(sigma2), compute_uv=False).sum()
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * cross
    return max(float(distance), 0.0)  # below 0 by rounding only


def inception_score(logits: np.ndarray, splits: int = IS_SPLITS) -> tuple[float, float]:
    """exp E[KL(p(y|x) ‖ p(y))], Salimans et al. 2016 (arXiv 1606.03498), section 4: mean and deviation over splits.

    Rows are shuffled first, by a fixed seed: samples are sorted by class, and a split of few classes would score lower.
    """
    _check(logits, splits, f"{splits} splits")
    order = np.random.RandomState(SEED).permutation(len(logits))  # torch-fidelity's, for the same number
    log_p = log_softmax(np.asarray(logits, dtype=np.float64)[order], axis=1)
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
        log_marginal = logsumexp(part, axis=0) - np.log(len(part))
        scores.append(np.exp(np.sum(np.exp(part) * (part - log_marginal), axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kid(
    features1: np.ndarray, features2: np.ndarray, subsets: int = KID_SUBSETS, subset_size: int = KID_SUBSET_SIZE
) -> tuple[float, float]:
    """MMD² with the kernel (xᵀy / D + 1)³, Bińkowski et al. 2018 (arXiv 1801.01401), eq. 4: mean, and deviation.

    The unbiased estimate, hence sometimes below 0, over random subsets (fixed seed) of at most ``subset_size`` rows.
    """
    for features in (features1, features2):
        _check(features, 2, "KID")
    score = kid_features_to_metric(
        *(torch.as_tensor(f, dtype=torch.float64) for f in (features1, features2)),
        kid_subsets=subsets,
        kid_subset_size=min(subset_size, len(features1), len(features2)),
        rng_seed=SEED,
        verbose=False,
    )
    return score["kernel_inception_distance_mean"], score["kernel_inception_distance_std"]


def precision_recall(
    generated: np.ndarray, real: np.ndarray, k: int = NEIGHBOURS, block: int = 2000
) -> tuple[float, float]:
    """Improved precision and recall, Kynkäänniemi et al. 2019 (arXiv 1904.06991), eq. 1 to 3.

    A set's manifold is the union of balls about its points, each reaching to the point's k-th neighbour. Precision is
    the part of the generated set on the real set's manifold, recall the reverse. ``block`` rows of distances are in
    memory at a time, on a GPU if there is one.
    """
    for features in (generated, real):
        _check(features, k + 1, f"a {k}-th neighbour")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Distances are computed as |x|² + |y|² - 2xᵀy, which loses fewer digits about a common center.
    center = real.mean(axis=0, dtype=np.float64)
    sets = (torch.as_tensor(f - center, dtype=torch.float64, device=device) for f in (generated, real))
    return calculate_precision_recall_part(*sets, neighborhood=k, batch_size=block)


def _root(sigma: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(sigma)
    # Rounding makes zero eigenvalues slightly positive or negative, and their roots would be much larger.
    values[values < values[-1] * values.size * np.finfo(values.dtype).eps] = 0
    return (vectors * np.sqrt(values)) @ vectors.T


def _check(features: np.ndarray, least: int, purpose: str) -> None:
    if features.ndim != 2 or len(features) < least:
        raise ValueError(f"{purpose}: got shape {features.shape}, expected an array (N, D) of at least {least} rows")
    if not np.isfinite(features).all():
        raise ValueError("features have numbers that are not finite")
