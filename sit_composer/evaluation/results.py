"""The results of evaluation: the values, a row of a Markdown table, and statistics to use again."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from sit_composer.choices import LIGHTNING, METRICS, SIZES
from sit_composer.evaluation import metrics
from sit_composer.evaluation.metrics import STATISTICS, statistics
from sit_composer.outputs import write_arrays


def compute(names: list[str], fake: dict, real: dict, stored: dict) -> tuple[dict[str, float], dict[str, Any]]:
    """The metrics, and the settings of those that have any."""
    values: dict[str, float] = {}
    settings: dict[str, Any] = {}
    for name, output in (("fid", "features"), ("sfid", "spatial"), ("fd", "second")):
        if name in names:
            theirs = [stored[part] for part in STATISTICS.get(output, ()) if stored] or statistics(real[output])
            values[name] = metrics.frechet_distance(*statistics(fake[output]), *theirs)
    if "is" in names:
        values["is"], values["is_std"] = metrics.inception_score(fake["logits"])
        settings |= {"is_splits": metrics.IS_SPLITS, "seed": metrics.SEED}
    if "precision" in names or "recall" in names:
        both = zip(("precision", "recall"), metrics.precision_recall(fake["features"], real["features"]), strict=True)
        values |= {name: value for name, value in both if name in names}
        settings["neighbours"] = metrics.NEIGHBOURS
    if "kid" in names:
        values["kid"], values["kid_std"] = metrics.kid(fake["features"], real["features"])
        size = min(metrics.KID_SUBSET_SIZE, len(fake["features"]), len(real["features"]))
        settings |= {"kid_subsets": metrics.KID_SUBSETS, "kid_subset_size": size, "seed": metrics.SEED}
    return values, settings


def save_statistics(path: Path, outputs: dict[str, np.ndarray], identity: str) -> None:
    """Writes mu, sigma and, if there are spatial features, mu_s and sigma_s; and the identity of the extractor."""
    arrays: dict[str, np.ndarray] = {}
    for output, names in STATISTICS.items():
        if output in outputs:
            arrays |= zip(names, statistics(outputs[output]), strict=True)
    write_arrays(path, **arrays, features=np.array(identity))


def print_notes(results: list[dict[str, Any]], samples: str) -> None:
    """Prints the metrics that are missing and the warnings, each once; in them, any samples are called ``samples``."""
    lines = []
    for result in results:
        lines += [f"{name} is left out: {reason}" for name, reason in result["left_out"].items()]
        path = f"{result['samples']['path']}: "
        lines += [f"warning: {warning.replace(path, f'{samples}: ')}" for warning in result["warnings"]]
    for line in dict.fromkeys(lines):
        print(line, file=sys.stderr)


def markdown(result: dict[str, Any]) -> str:
    """A Markdown table with a row."""
    sampling = result["samples"]["sampling"] or {}
    sampler = " ".join(str(sampling[name]) for name in ("mode", "sampling_method") if name in sampling)
    evaluations = sampling.get("evaluations")
    weights = str((sampling.get("checkpoint") or {}).get("weights"))  # ema:NAME if it has several averages
    cells = {
        "model": model_name(sampling.get("model")) + (f", {weights}" if ":" in weights else ""),
        "sampler": sampler or "–",
        "evals": f"{evaluations:.1f}".removesuffix(".0") if isinstance(evaluations, int | float) else "–",
        "cfg": sampling.get("cfg_scale", "–"),
        "seed": sampling.get("seed", "–"),
    }
    return table([{**cells, **metric_cells(result)}])


def metric_cells(result: dict[str, Any]) -> dict[str, str]:
    """A table's cells of all metrics, by heading. Distances of DINOv2's features are called FDD, of others' FD."""
    cells, values = dict[str, str](), result["metrics"]
    for name, metric in METRICS.items():
        heading, digits, features = metric.heading, metric.digits, result.get(metric.output, result["features"])["name"]
        if metric.output == "second" and name not in values:
            continue  # without a second extractor
        if "FID" in heading and features != "inception":
            heading, digits = heading.replace("FID", "FDD" if features == "dinov2" else "FD"), ".4g"
        heading = f"{heading}, {features}" if heading in cells else heading
        cells[heading] = f"{metric.factor * values[name]:{digits}}" if name in values else "–"
    return cells


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of rows with the same headings."""
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(map(str, row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def model_name(model: dict | None) -> str:
    """SiT-B/2 for the arguments of that size; other sizes as width × depth."""
    if not isinstance(model, dict) or "hidden_size" not in model:
        return "–"
    size = (model["hidden_size"], model.get("depth"), model.get("num_heads"))
    name = next((name for name, known in SIZES.items() if known == size), f"{size[0]}×{size[1]}")
    family = "LightningDiT" if LIGHTNING.items() <= model.items() else "SiT"
    return f"{family}-{name}/{model.get('patch_size')}"
