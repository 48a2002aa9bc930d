"""A run's page: what its folder holds, as one HTML file that needs nothing else.

Here it is gathered and bounded; `page.html`, whose script puts every text in as text, shows it.
"""

import base64
import io
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from sit_composer.checkpoint import metrics
from sit_composer.checkpoint.folder import checkpoints, meant
from sit_composer.checkpoint.metrics import Row
from sit_composer.config.checks import redact
from sit_composer.config.same_run import CONFIG
from sit_composer.errors import UserError
from sit_composer.storage import LocalFolder, RunFolder

REPORT = "report.html"
GENERATOR = '<meta name="generator" content="sit_composer.report">'  # by which the command knows its own pages
TEMPLATE = Path(__file__).with_name("page.html")
GRID = re.compile(r"samples/ba(\d+)\.png")
PIXELS = 50_000_000  # of an image at most
GRIDS, GRID_BYTES, GRID_WIDTH = 16, 150_000, 900  # images at most, and what each may have before it is made smaller
POINTS = 800  # of a curve
ROWS = 200  # of a table
CURVES = 60
SMOOTHING = 50  # a smoothed loss is an average over about this part of the rows
HEAD = ("batch", "batches", "samples", "epoch", "time")  # of a row, before what was logged


def report_page(folders: list[RunFolder]) -> bytes:
    """The page of one run, or of two that are compared; UserError for a folder that holds no run."""
    data = {"made": time.time(), "runs": [gather(folder) for folder in folders]}
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # </script> in a name ends no script
    return TEMPLATE.read_text().replace("<!-- generator -->", GENERATOR).replace('"data"', text).encode()


def gather(folder: RunFolder) -> dict[str, Any]:
    """What the page shows of a run, as JSON holds it."""
    sizes = folder.listing()
    found = checkpoints(folder, sizes)
    if not (found or CONFIG in sizes or metrics.NAME in sizes):
        raise UserError(f"{folder.uri}: no run, expected the folder that trainer.save_folder names{meant(folder)}")
    config = read_config(folder)
    attempts, rows = metrics.read(folder.read(metrics.NAME) or b"")
    for name, known in ((CONFIG, config), (metrics.NAME, attempts)):
        if sizes.get(name) and not known:
            print(f"warning: {folder.uri}/{name}: can't be read; the page is without it", file=sys.stderr)
    return {
        "name": str(config.get("run_name") or folder.uri.rstrip("/").rpartition("/")[2]),
        "uri": folder.uri,
        "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100) if config else "",
        "keys": dict(flat(config)),
        "duration": dict(flat(config)).get("trainer.max_duration", ""),
        "attempts": [redact(attempt) for attempt in attempts],
        "last": next((row for row in reversed(rows) if "batches" in row), None),
        "seconds": trained_seconds(attempts, rows),
        "curves": curves(rows, attempts),
        "evaluations": evaluations(rows)[-ROWS:],
        "grids": grids(folder, list(sizes)),
        "checkpoints": [[name, sum(sizes[file] for file in files)] for name, files in found.items()][-ROWS:],
        "commands": commands(folder),
    }


def read_config(folder: RunFolder) -> dict[str, Any]:
    """The run's config without secrets; empty if it can't be read."""
    try:
        config = yaml.safe_load(folder.read(CONFIG) or b"")
        return redact(config) if isinstance(config, dict) else {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return {}


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """A config's keys, as model.depth, and their values as text."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flat(item, f"{prefix}.{key}" if prefix else key)
    elif prefix:
        yield prefix, json.dumps(value, ensure_ascii=False).strip('"')


def trained_seconds(attempts: list[Row], rows: list[Row]) -> float:
    """From each attempt's first row to its last; what a kill has made void, and the time between, is left out."""
    seconds, starts = 0.0, sorted((a["start"], a["time"]) for a in attempts if isinstance(a.get("time"), int | float))
    for (start, began), (end, _) in pairwise([*starts, (math.inf, 0)]):
        within = [row.get("time") for row in rows if start < row["batch"] <= end]
        times = [time for time in within if isinstance(time, int | float)]
        seconds += max(0, max(times) - began) if times else 0
    return seconds


def curves(rows: list[Row], attempts: list[Row]) -> dict[str, dict[str, list[float]]]:
    """Of each number that was logged, its batches x, its values y, and of losses the smoothed ones."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in HEAD and isinstance(value, int | float) and not isinstance(value, bool):
                x, y = series.setdefault(name, ([], []))
                x.append(row["batch"])
                y.append(value)
    known = [a for a in reversed(attempts) if isinstance(a.get("peak"), int | float) and a["peak"]]
    if known and "throughput/images_per_sec" in series:
        x, y = series["throughput/images_per_sec"]
        peaks = [next((a for a in known if a["start"] < batch), known[0])["peak"] for batch in x]
        series["throughput/mfu"] = x, [value / peak for value, peak in zip(y, peaks, strict=True)]
    found = {}
    for name in sorted(series, key=importance)[:CURVES]:
        x, y = series[name]
        found[name] = {"x": thin(x), "y": thin(y)}
        if name.startswith("loss/train/") and not name.endswith("/nonfinite"):
            found[name]["smooth"] = thin(smoothed(y))
    return found


def importance(name: str) -> tuple[int, str]:
    """The order of curves, the most important first."""
    first = ("loss/train/total", "loss/train/", "metrics/", "loss/time/", "lr", "throughput/images_per_sec",
             "throughput/mfu", "throughput/waiting_for_data", "gradient/norm", "gradient/")  # fmt: skip
    return next((i for i, start in enumerate(first) if name.startswith(start)), len(first)), name


def thin(values: list[Any]) -> list[Any]:
    """At most `POINTS` of them at equal distances, with the first and the last."""
    last = len(values) - 1
    return values if last < POINTS else [values[round(i * last / (POINTS - 1))] for i in range(POINTS)]


def smoothed(values: list[float]) -> list[float]:
    """The exponential average, without the weight that it would give its start."""
    keep, average, weight, found = 1 - 1 / max(5, len(values) / SMOOTHING), 0.0, 0.0, []
    for value in values:
        weight = keep * weight + 1 - keep
        average += (value - average) * (1 - keep) / weight
        found.append(float(f"{average:.6g}"))
    return found


def evaluations(rows: list[Row]) -> list[Row]:
    """The batch and the values of each evaluation."""
    found = [{name: value for name, value in row.items() if name.startswith("metrics/")} for row in rows]
    return [{"batch": row["batch"], **values} for row, values in zip(rows, found, strict=True) if values]


def grids(folder: RunFolder, names: list[str]) -> list[dict[str, Any]]:
    """Some of the images of the sample grid, from the first to the last, as data URIs."""
    found = sorted((int(match[1]), match[0]) for match in map(GRID.fullmatch, names) if match)
    last = len(found) - 1
    chosen = found if last < GRIDS else [found[round(i * last / (GRIDS - 1))] for i in range(GRIDS)]
    sources = ((batch, data_uri(folder.read(name) or b"")) for batch, name in chosen)
    return [{"batch": batch, "src": source} for batch, source in sources if source]


def data_uri(content: bytes) -> str | None:
    """An image, made smaller if it is large; None if it is none."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            kind = "png"
            if image.width * image.height > PIXELS:
                return None
            if len(content) > GRID_BYTES:
                image = image.convert("RGB")
                image.thumbnail((GRID_WIDTH, 4 * GRID_WIDTH))
                smaller = io.BytesIO()
                image.save(smaller, "WEBP", quality=80)
                content, kind = smaller.getvalue(), "webp"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def commands(folder: RunFolder) -> list[list[str]]:
    """What to do with the run, and the command for it."""
    uri = folder.uri.rstrip("/")
    place, config = shlex.quote(uri), f"{uri}/{CONFIG}"
    copy = "aws s3 cp" if uri.startswith("s3://") else "# copy"  # of other stores, each by its own program
    fetch = "" if isinstance(folder, LocalFolder) else f"{copy} {shlex.quote(config)} {CONFIG}\n"
    config = CONFIG if fetch else shlex.quote(config)
    return [
        ["resume, or train longer", f"{fetch}composer sit_composer/train.py {config} trainer.max_duration=…"],
        ["generate images", f"python -m sit_composer.sample {place} --out samples"],
        ["export the weights", f"python -m sit_composer.export {place} --out exported"],
        ["make this page anew", f"python -m sit_composer.report {place} --out {REPORT}"],
    ]
