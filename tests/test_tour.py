"""The notebook docs/tour.ipynb: it runs, and what it shows is right."""

import json
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

TOUR = ROOT / "docs" / "tour.ipynb"
RESULTS = """
import json
print(json.dumps({"first": first_loss, "last": float(np.mean(losses[-100:])), "right": list(right.values()),
                  "accuracy": accuracy, "states": len(states)}))
"""


def outputs(cells: list[dict]) -> list[dict]:
    return [output for cell in cells for output in cell.get("outputs", [])]


def test_the_notebook_is_small_and_committed_with_what_it_showed():
    notebook = json.loads(TOUR.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) == 10
    assert [cell["execution_count"] for cell in code] == list(range(1, 11))  # run once, from top to bottom
    assert TOUR.stat().st_size < 300_000
    assert sum("image/png" in output.get("data", {}) for output in outputs(code)) >= 5
    assert [output for output in outputs(code) if output["output_type"] == "error"] == []


@pytest.mark.slow
def test_the_notebook_trains_a_network_that_generates_and_reads_digits(tmp_path: Path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(TOUR, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(RESULTS))
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    found = json.loads(notebook.cells[-1].outputs[0]["text"])
    said = "".join(output.get("text", "") for output in outputs(notebook.cells))
    assert found["first"] == pytest.approx(float(said.split("expected ")[1].split()[0]), abs=0.02)
    assert found["last"] < 0.6 * found["first"]
    assert found["right"][0] > 0.5
    assert found["right"][2] > 0.9
    assert found["accuracy"] > 0.5
    assert found["states"] == 49  # Euler's evaluations between 50 times
    assert "equal: True" in said
