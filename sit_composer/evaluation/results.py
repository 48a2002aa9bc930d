"""What evaluation gives: the numbers, a row of a Markdown table, and statistics to use again."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sit_composer.choices import SIZES
from sit_composer.evaluation import metrics
from sit_composer.evaluation.metrics import STATISTICS, statistics
from sit_composer.evaluation.picture_sets import PictureSet
from sit_composer.outputs import write_arrays, write_json


def compute(names: list[str], fake: dict, real: dict, stored: dict) -> tuple[dict[str, float], dict[str, Any]]:
    """The metrics, and the settings of those that have any."""
    values: dict[str, float] = {}
    settings: dict[str, Any] = {}
    for name, output in (("fid", "features"), ("sfid", "spatial")):
        if name in names:
            mu, sigma = STATISTICS[output]
            theirs = (stored[mu], stored[sigma]) if stored else metrics.statistics(real[output])
            values[name] = metrics.frechet_distance(*metrics.statistics(fake[output]), *theirs)
    if "is" in names:
        values["is"], values["is_std"] = metrics.inception_score(fake["logits"])
        settings |= {"is_splits": metrics.IS_SPLITS, "seed": metrics.SEED}
    if {"precision", "recall"} & set(names):
        both = dict(
            zip(("precision", "recall"), metrics.precision_recall(fake["features"], real["features"]), strict=True)
        )
        values |= {name: both[name] for name in both if name in names}
        settings["neighbours"] = metrics.NEIGHBOURS
    if "kid" in names:
        values["kid"], values["kid_std"] = metrics.kid(fake["features"], real["features"])
        size = min(metrics.KID_SUBSET_SIZE, len(fake["features"]), len(real["features"]))
        settings |= {"kid_subsets": metrics.KID_SUBSETS, "kid_subset_size": size, "seed": metrics.SEED}
    return values, settings


def save_statistics(path: Path, outputs: dict[str, Any], identity: str) -> None:
    """Writes mu, sigma and, if there are spatial features, mu_s and sigma_s; and what they are features of."""
    arrays = {}
    for output, names in STATISTICS.items():
        if output in outputs:
            arrays |= zip(names, statistics(outputs[output]), strict=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(path, **arrays, features=np.array(identity))


def describe(pictures: PictureSet) -> dict[str, Any]:
    return {"path": pictures.path, "count": pictures.count, "size": pictures.size}


def versions() -> dict[str, str]:
    packages = ("sit-composer", "torch", "torch-fidelity", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, path)


def markdown(result: dict[str, Any]) -> list[str]:
    """A Markdown table's head and row. Distances of features that aren't Inception's are called FD, not FID."""
    sampling, values = result["samples"]["sampling"] or {}, result["metrics"]
    inception = result["features"]["name"] == "inception"
    distance, digits = ("FID", ".2f") if inception else ("FD", ".4g")
    sampler = " ".join(str(sampling[name]) for name in ("mode", "sampling_method") if name in sampling)
    evaluations = sampling.get("evaluations")
    cells = {
        "model": model_name(sampling.get("model")),
        "sampler": sampler or "–",
        "evals": f"{evaluations:.1f}".removesuffix(".0") if isinstance(evaluations, int | float) else "–",
        "cfg": sampling.get("cfg_scale", "–"),
        "seed": sampling.get("seed", "–"),
        distance: f"{values['fid']:{digits}}" if "fid" in values else "–",
        f"s{distance}": f"{values['sfid']:{digits}}" if "sfid" in values else "–",
        "IS": f"{values['is']:.2f}" if "is" in values else "–",
        "P": f"{values['precision']:.3f}" if "precision" in values else "–",
        "R": f"{values['recall']:.3f}" if "recall" in values else "–",
        "KID × 10³": f"{1000 * values['kid']:.3f}" if "kid" in values else "–",
    }
    rows = [cells.keys(), ["---"] * len(cells), map(str, cells.values())]
    return ["| " + " | ".join(row) + " |" for row in rows]


def model_name(model: dict | None) -> str:
    """SiT-B/2 for the arguments of that size; others are told by width × depth."""
    if not isinstance(model, dict) or "hidden_size" not in model:
        return "–"
    size = (model["hidden_size"], model.get("depth"), model.get("num_heads"))
    name = next((name for name, known in SIZES.items() if known == size), f"{size[0]}×{size[1]}")
    return f"SiT-{name}/{model.get('patch_size')}"
