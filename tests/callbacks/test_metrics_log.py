"""What a run writes to metrics.jsonl."""

import math
import re

import pytest
import torch

from sit_composer import randomness
from sit_composer.callbacks.loss_by_time import LossByTime, bin_sums
from sit_composer.callbacks.metrics_log import means
from sit_composer.callbacks.run_record import RunRecord
from sit_composer.checkpoint import metrics
from tests.helpers.runs import bits, differences


def rows_of(folder) -> tuple[list, list]:
    return metrics.read((folder / "metrics.jsonl").read_bytes())


def comparable(rows: list[dict]) -> list[dict]:
    """Rows without what depends on the clock."""
    return [{k: v for k, v in row.items() if k != "time" and not k.startswith("throughput/")} for row in rows]


def test_a_resumed_run_has_the_metrics_and_bits_of_an_uninterrupted_one(run, tmp_path, digits_shards):
    evaluation = f"eval_data={{local: {digits_shards}, global_batch_size: 599, num_workers: 0}}"
    logger = f"loggers={{file: {{filename: '{tmp_path}/log.txt'}}}}"
    options = ["data.flip=true", "loss_by_time={interval: 2ba, bins: 4}", evaluation, "trainer.eval_interval=5ba"]
    assert run("trainer.max_duration=12ba", "data.flip=true", folder="without") == 0
    assert run("trainer.max_duration=12ba", *options, logger, folder="whole") == 0
    assert differences(bits(tmp_path / "without"), bits(tmp_path / "whole")) == []
    assert run("trainer.max_duration=6ba", *options) == 0
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:  # of two batches whose checkpoint never came, and half
        file.write(b'{"batch": 7, "batches": 1, "loss/train/total": 9.0}\n{"batch": 8, "batches": 1, "loss/train')
    assert run("trainer.max_duration=12ba", *options) == 0
    assert differences(bits(tmp_path / "whole"), bits(tmp_path / "run")) == []
    (attempts, whole), (resumed, rows) = rows_of(tmp_path / "whole"), rows_of(tmp_path / "run")
    assert [attempt["start"] for attempt in attempts + resumed] == [0, 0, 6]
    assert {"network", "data", "device"} <= resumed[1]["about"].keys()
    assert torch.__version__.startswith(resumed[1]["versions"]["torch"])
    # The interrupted run was evaluated at its end, too.
    assert comparable(whole) == [
        row for row in comparable(rows) if row.keys() != {"batch", "metrics/eval/loss"} or row["batch"] != 6
    ]
    steps = [row for row in whole if "batches" in row]
    assert [row["batch"] for row in steps] == list(range(1, 13))
    logged = re.findall(r"loss/train/total: (\S+)", (tmp_path / "log.txt").read_text())
    assert [row["loss/train/total"] for row in steps] == pytest.approx([float(loss) for loss in logged], abs=1e-4)
    assert all(row["lr"] > 0 and row["throughput/images_per_sec"] > 0 for row in steps)
    assert [row["batch"] for row in whole if "metrics/eval/loss" in row] == [5, 10, 12]
    assert [row["batch"] for row in whole if "loss/time/0-0.25" in row] == [2, 4, 6, 8, 10, 12]


def test_a_run_that_is_told_to_stop_has_all_its_batches(run, tmp_path, monkeypatch):
    import os
    import signal

    def tell(self, state, logger):
        if state.timestamp.batch == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunRecord, "batch_end", tell, raising=False)
    assert run("trainer.max_duration=6ba") == 143
    assert [row["batch"] for row in rows_of(tmp_path / "run")[1]] == [1, 2, 3]


def test_no_step_waits_for_the_device(run, tmp_path, monkeypatch):
    """Between its first batches and its checkpoint, nothing of a run with all of this reads a tensor's value."""
    reads, reading = [], {name: getattr(torch.Tensor, name) for name in ("item", "tolist", "__float__", "__bool__")}

    def watch(name):
        def read(self, *args):
            import traceback

            stack = "".join(traceback.format_stack())
            if any(part in stack for part in ("callbacks/metrics_log.py", "callbacks/loss_by_time.py", "loss.item()")):
                reads.append((name, "flush" in stack))
            return reading[name](self, *args)

        return read

    for name in reading:
        monkeypatch.setattr(torch.Tensor, name, watch(name))
    assert run("trainer.max_duration=10ba", "loss_by_time={interval: 2ba}") == 0
    assert reads == [("tolist", True)]  # at the only checkpoint


def test_the_loss_by_time_is_the_mean_of_the_samples_in_each_bin():
    keys = torch.arange(500)
    t, losses = randomness.uniform(keys, randomness.TIME), torch.rand(500, generator=torch.Generator().manual_seed(0))
    t[0], t[1], losses[2] = 0.0, 1.0, math.nan  # the ends count, and what isn't finite stays in its bin
    sums, counts = bin_sums(t, losses, 5)
    for i in range(5):
        inside = (t >= i / 5) & ((t < (i + 1) / 5) | (i == 4))
        assert counts[i] == inside.sum()
        torch.testing.assert_close(sums[i], losses[inside].double().sum(), equal_nan=True)
    assert counts.sum() == 500
    assert sums.isnan().sum() == 1
    assert LossByTime(5, "10ba").bins == 5


def test_a_number_that_is_not_finite_is_counted_and_left_out():
    assert means({"loss": [1.0, math.nan, 2.0], "norm": [math.inf]}) == {
        "loss": 1.5,
        "loss/nonfinite": 1,
        "norm": None,
        "norm/nonfinite": 1,
    }
