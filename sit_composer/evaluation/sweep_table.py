"""A sweep's cells, by name, as a table and as a plot."""

import io
from argparse import Namespace
from typing import Any

from matplotlib.figure import Figure

from sit_composer.choices import ADAPTIVE_METHODS, METRICS
from sit_composer.evaluation.results import metric_cells, table

AXES = {  # of the grid: headings
    "weights": "weights", "sampling_method": "solver", "num_steps": "steps", "cfg_scale": "cfg", "time_shift": "shift",
    "seed": "seed",
}  # fmt: skip
ALONG = ("cfg_scale", "num_steps", "time_shift", "seed", "weights", "sampling_method")  # the plot's x: the first varied
Results = list[dict[str, Any]]  # of evaluate, each with its "cell"


def values_of(cell: Namespace) -> dict[str, Any]:
    """A cell's place in the grid. An adaptive solver has no number of steps."""
    values = {name: getattr(cell, name) for name in AXES}
    return {**values, "num_steps": None} if cell.sampling_method in ADAPTIVE_METHODS else values


def name_of(values: dict[str, Any]) -> str:
    """The cell's name, such as "ema heun 25 cfg 1.5"; a shift of 1 and the seed 0 are left out."""
    steps = "" if values["num_steps"] is None else f" {values['num_steps']}"
    shift = "" if values["time_shift"] == 1 else f" shift {values['time_shift']:.10g}"
    seed = f" seed {values['seed']}" if values["seed"] else ""
    return f"{values['weights']} {values['sampling_method']}{steps} cfg {values['cfg_scale']:.10g}{shift}{seed}"


def varied(results: Results) -> dict[str, list[Any]]:
    """The values of each axis that has several, in order."""
    values = {name: list(dict.fromkeys(result["cell"][name] for result in results)) for name in AXES}
    return {name: sorted(found, key=order) for name, found in values.items() if len(found) > 1}


def order(value: Any) -> tuple[bool, Any]:
    return (value is None, "" if value is None else value)


def make_table(results: Results) -> str:
    """A row per cell, in the grid's order, with what varies; the smallest Fréchet distance is bold."""
    shown = {*varied(results), "cfg_scale", "num_steps"}
    best = min(results, key=lambda result: result["metrics"].get("fid", 0))
    rows = []
    for result in sorted(results, key=lambda result: [order(value) for value in result["cell"].values()]):
        cell, metrics = result["cell"], metric_cells(result)
        place = {AXES[name]: text(cell[name]) for name in AXES if name in shown}
        if result is best and "fid" in result["metrics"]:
            first = next(iter(metrics))
            metrics[first] = f"**{metrics[first]}**"
        rows.append({**place, "passes": text(result["samples"]["sampling"]["passes"]), **metrics})
    empty = {heading for heading in rows[0] if all(row[heading] == "–" for row in rows)}
    return table([{heading: value for heading, value in row.items() if heading not in empty} for row in rows])


def text(value: Any) -> str:
    return "–" if value is None else f"{value:.10g}" if isinstance(value, float) else str(value)


def draw_plot(results: Results) -> bytes:
    """A PNG with a panel per metric. Each line has the cells that differ in nothing but x."""
    axes = varied(results)
    along = next((name for name in ALONG if name in axes), "cfg_scale")
    lines: dict[str, Results] = {}
    for result in sorted(results, key=lambda result: order(result["cell"][along])):
        others = [name for name in axes if name != along]
        lines.setdefault(", ".join(f"{AXES[n]} {text(result['cell'][n])}" for n in others), []).append(result)
    shown = [name for name in METRICS if name != "fd" or name in results[0]["metrics"]]
    headings = dict(zip(shown, metric_cells(results[0]), strict=True))
    names = [name for name in METRICS if any(name in result["metrics"] for result in results)]
    columns = min(3, len(names))
    figure = Figure(figsize=(4 * columns, 3 * -(-len(names) // columns)), layout="constrained")
    panels: list[Any] = list(figure.subplots(-(-len(names) // columns), columns, squeeze=False).flat)
    for panel, name in zip(panels, names, strict=False):
        for label, line in lines.items():
            found = [result for result in line if name in result["metrics"]]
            at = [result["cell"][along] for result in found]
            ys = [METRICS[name].factor * result["metrics"][name] for result in found]
            panel.plot([x if isinstance(x, int | float) else text(x) for x in at], ys, "o-", label=label, markersize=4)
        panel.set(xlabel=AXES[along], title=headings[name])
        panel.grid(alpha=0.3)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    if len(lines) > 1:
        panels[0].legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
