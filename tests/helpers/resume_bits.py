"""Trains a small network several times in one launch:

    composer -n N -m tests.helpers.resume_bits SHARDS TOP WAY:NAME:BATCHES …

WAY is ddp, fsdp or hsdp, with -compiled, -newer (every option of the blocks), -averages (several), -muon, -sra or
without; or with -skip or -rollback: batches 3 and 10 are then not finite on the last rank. Each run resumes from
TOP/WAY/NAME, trains to BATCHES and saves there; an epoch of 200 digits has 7 batches, and every fifth batch is
evaluated and sampled.
With ``:told`` appended, the last rank gets a SIGTERM in the first evaluation.
"""

import os
import signal
import sys
from pathlib import Path

from sit_composer.callbacks.run_record import RunRecord
from sit_composer.choices import ON_NAN
from sit_composer.errors import EVICTED
from tests.helpers import ranks
from tests.helpers.networks import NEWER
from tests.helpers.poison import poison
from tests.helpers.runs import train_at_once

QUICKSTART = str(Path(__file__).parents[2] / "yamls" / "quickstart.yaml")


def run(shards: str, folder: Path, way: str, batches: int, told: bool) -> None:
    overrides = [
        f"data.local={shards}", "data.global_batch_size=28", "data.flip=true", "data.num_workers=0",
        "model.hidden_size=36", "model.depth=2", "model.num_heads=2", "callbacks={}", "optimizer.lr=1e-4",
        "scheduler={linear: {t_max: 14ba}}", "trainer.progress_bar=false",
        f"eval_data={{local: {shards}, global_batch_size: 68, num_workers: 0}}", "trainer.eval_interval=5ba",
        "sample_grid={interval: 5ba, labels: [1, 2, 3], per_class: 1, num_steps: 3}",
        f"trainer.save_folder={folder}", f"trainer.save_interval={batches}ba", f"trainer.max_duration={batches}ba",
        f"loggers={{file: {{filename: '{folder}-{batches}.log', flush_interval: 1}}}}",
    ]  # fmt: skip
    if way.startswith("fsdp"):
        overrides.append("fsdp={}")
    if way.startswith("hsdp"):
        overrides.append("fsdp={data_parallel_replicate_degree: 2, activation_checkpointing: true}")
        overrides.append("trainer.device_train_microbatch_size=5")  # of 14: in three parts
    if way.endswith("newer"):
        overrides += ["model.hidden_size=40", *(f"model.{name}={value}" for name, value in NEWER.items())]
    if way.endswith("averages"):
        overrides += ["ema.decay=0.5", "ema.decays=[0.9]", "ema.power=[0.05, 0.1]"]
    if way.endswith("muon"):
        overrides.append("optimizer.name=muon")
    if (on_nan := way.rpartition("-")[2]) in ON_NAN:
        poison({3, 10})
        overrides += [f"on_nan={on_nan}", "trainer.save_interval=2ba"]
    if way.endswith("sra"):
        overrides.append("alignment={name: sra, block: 1, teacher_block: 2}")
    if way.endswith("compiled"):
        # The default backend compiles C++ for a minute; this one tests the parts that both share.
        overrides.append(f"compile={'aot_eager' if way.startswith('fsdp') else 'true'}")
    RunRecord.eval_batch_start = tell if told else lambda *_: None
    if train_at_once([QUICKSTART, *overrides], ranks.main) != (EVICTED if told else 0):
        raise SystemExit(f"{way}: {folder.name} failed at {batches} batches")


def tell(*_) -> None:
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    for step in sys.argv[3:]:
        way, name, batches, *told = step.split(":")
        run(sys.argv[1], Path(sys.argv[2], way, name), way, int(batches), told == ["told"])
