"""The metrics against the formulas of ADM's evaluator and of pytorch-fid, written down here, on one set of features.

The features are of the packaged EfficientNet, of digits and of digits that are blurred. The formulas are those of
`evaluations/evaluator.py` (openai/guided-diffusion) and `fid_score.py` (mseitzer/pytorch-fid), which share the first.
"""

import numpy as np
import pytest
import torch
from scipy import linalg
from sklearn.datasets import load_digits
from torch import nn

from sit_composer.evaluation.efficientnet import EfficientNetLite0
from sit_composer.evaluation.metrics import SEED, frechet_distance, inception_score, precision_recall, statistics

CHANNELS = 40  # of the 1,280 features: fewer than images, as a root of a singular matrix isn't to be compared
TOLERANCE = 1e-3
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::scipy.linalg.LinAlgWarning")]


@pytest.fixture(scope="module")
def outputs() -> list[dict[str, np.ndarray]]:
    """Of generated and of real images: features (N, 40), spatial (N, 49) and logits (N, 1000), float32."""
    grey = torch.from_numpy(load_digits().images[:120] * 255 / 16).float()[:, None].expand(-1, 3, -1, -1)
    blurred = nn.functional.avg_pool2d(grey[:60], 3, stride=1, padding=1) * 1.5
    network = EfficientNetLite0().eval()
    network.network.extract_features, seen = _seen(network.network.extract_features)
    found = []
    for images in (blurred.clamp(0, 255), grey[60:]):
        parts = []
        for batch in images.round().to(torch.uint8).split(30):
            with torch.inference_mode():
                features, logits = network(batch)
            parts.append((features[:, :CHANNELS], seen.pop().mean(dim=1).flatten(1), logits))
        names = ("features", "spatial", "logits")
        found.append(
            {name: torch.cat(part).numpy() for name, part in zip(names, zip(*parts, strict=True), strict=True)}
        )
    return found


def _seen(function):
    """The function, and a list of what it returned."""
    seen = []

    def watched(x):
        seen.append(function(x))
        return seen[-1]

    return watched, seen


def published_distance(x: np.ndarray, y: np.ndarray, eps: float = 1e-6) -> float:
    """FID of both: the trace of `sqrtm`'s root, with eps on the diagonals if that isn't finite."""
    (mu1, sigma1), (mu2, sigma2) = ((f.mean(axis=0), np.cov(f, rowvar=False)) for f in (x, y))
    root = linalg.sqrtm(sigma1.dot(sigma2))
    if not np.isfinite(root).all():
        offset = np.eye(len(sigma1)) * eps
        root = linalg.sqrtm((sigma1 + offset).dot(sigma2 + offset))
    if np.iscomplexobj(root):
        assert np.allclose(np.diagonal(root).imag, 0, atol=1e-3)  # where both raise an error
        root = root.real
    return (mu1 - mu2).dot(mu1 - mu2) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root)


def published_score(logits: np.ndarray, split_size: int = 5000) -> float:
    """ADM's Inception Score: the mean over splits of 5,000 rows, in order."""
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p, scores = p / p.sum(axis=1, keepdims=True), []
    for start in range(0, len(p), split_size):
        part = p[start : start + split_size]
        kl = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        scores.append(np.exp(kl.sum(axis=1).mean()))
    return float(np.mean(scores))


def published_precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """ADM's: squared distances, each manifold's radii those to the k-th neighbour, the point itself being the 0-th."""

    def distances(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        products = (u**2).sum(axis=1)[:, None] - 2 * u @ v.T + (v**2).sum(axis=1)
        return np.maximum(products, 0)

    radii = [np.partition(distances(f, f), range(k + 1), axis=1)[:, k] for f in (real, fake)]
    between = distances(real, fake)
    return (between <= radii[0][:, None]).any(axis=0).mean(), (between <= radii[1]).any(axis=1).mean()


@pytest.mark.parametrize("output", ["features", "spatial"])
def test_fid_and_sfid_are_adms_and_pytorch_fids(outputs, output):
    fake, real = (part[output] for part in outputs)
    ours = frechet_distance(*statistics(fake), *statistics(real))
    assert ours > 10 * TOLERANCE
    assert ours == pytest.approx(published_distance(fake, real), rel=TOLERANCE)
    assert ours == pytest.approx(published_distance(fake.astype(np.float64), real.astype(np.float64)), rel=1e-6)


def test_fid_is_theirs_where_a_covariance_is_singular_and_only_eps_makes_their_root_finite(outputs):
    fake, real = (np.pad(part["features"], ((0, 0), (0, 2))) for part in outputs)  # features that are always 0
    ours = frechet_distance(*statistics(fake), *statistics(real))
    assert ours == pytest.approx(published_distance(fake, real), rel=TOLERANCE)


def test_inception_score_is_adms_of_as_many_splits(outputs):
    logits = np.concatenate([part["logits"] for part in outputs])
    # ADM splits in order, and samples at random; ours shuffles first. Of 50,000 images, both have 10 splits.
    shuffled = logits[np.random.RandomState(SEED).permutation(len(logits))]
    assert inception_score(logits, splits=1)[0] == pytest.approx(published_score(logits), rel=TOLERANCE)
    for splits in (2, 10):
        theirs = published_score(shuffled, len(logits) // splits)
        assert inception_score(logits, splits)[0] == pytest.approx(theirs, rel=TOLERANCE)


def test_precision_and_recall_are_adms(outputs):
    fake, real = (part["features"] for part in outputs)
    theirs = published_precision_recall(real, fake)
    assert 0 < theirs[0] < 1
    assert theirs[0] != theirs[1]
    assert precision_recall(fake, real) == pytest.approx(theirs, abs=TOLERANCE)
