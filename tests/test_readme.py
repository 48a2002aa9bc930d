"""The README's commands and code, run in its order in an empty folder as a reader would."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from sit_composer.train import main as train
from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]


def make_sources(folder: Path) -> None:
    """What the README's reader has: a folder of pictures by class, and a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    digits = load_digits()
    rows = []
    for i in range(100):
        buffer = io.BytesIO()
        Image.fromarray((digits.images[i] * 15).astype("uint8")).save(buffer, "PNG")
        rows.append({"image": buffer.getvalue(), "label": int(digits.target[i])})
        path = folder / "pictures" / f"class{digits.target[i]}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")


def test_the_figures_and_the_picture_of_the_quickstart_are_there():
    assert re.search(r"reads \d+\.\d %\nof the drawn ones", README)
    assert (ROOT / "yamls" / "quickstart.png").stat().st_size > 1000


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"make ([a-z-]+)", " ".join(COMMANDS))) | {"lint", "test-slow"}
    makefile = (ROOT / "Makefile").read_text()
    assert {"quickstart", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


@pytest.mark.slow
def test_its_commands_run_in_its_order(tmp_path):
    make_sources(tmp_path)
    for name in ("sit_composer", "convert", "yamls", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    commands = [line for line in COMMANDS if not line.startswith("make ")]
    assert len(commands) == 11
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "runs/first/samples/grid.png").exists()
    assert (tmp_path / "runs/first/sde.npz").exists()
    code = next(block for language, block in BLOCKS if language == "python")
    names = {"torch": torch}
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        exec(code, names)
    finally:
        os.chdir(here)
    assert names["x"].shape == (4, 1, 8, 8)
    assert names["x"].isfinite().all()


def test_its_help_command_lists_every_key(capsys):
    with pytest.raises(SystemExit):
        train(["--help"])
    text = capsys.readouterr().out
    assert all(key in text for key in ("model.hidden_size", "transport.sample_eps", "eval_data", "trainer"))
