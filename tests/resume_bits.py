"""Interrupted and uninterrupted runs, on every rank of one launch:   composer -n N -m tests.resume_bits SHARDS FOLDER …

For each way of training that is named (ddp, fsdp, and either of them with -compiled) it trains a small network once
without interruption, and once for each moment with: in the middle of an epoch, at its end, and after an evaluation. It
compares all that the last checkpoints hold, but for times on the clock, and the logged losses; prints the differences.
"""

import re
import sys
from pathlib import Path

from composer.utils import dist

from sit_composer.run_folder import LocalFolder, newest
from sit_composer.safe_load import load_file, load_sharded
from tests.ranks import train  # patched for a CPU
from tests.test_train import differences

QUICKSTART = str(Path(__file__).parent.parent / "yamls" / "quickstart.yaml")
MOMENTS = {"middle": 4, "epoch": 7, "evaluation": 5}  # batches; 7 are an epoch, and every fifth is evaluated


def run(shards: str, folder: Path, way: str, batches: int) -> None:
    overrides = [
        f"data.local={shards}", "data.global_batch_size=256", "data.flip=true", "data.num_workers=0",
        "model.hidden_size=36", "model.depth=2", "model.num_heads=2", "callbacks={}",
        "scheduler={linear: {t_max: 14ba}}",
        f"eval_data={{local: {shards}, global_batch_size: 600, num_workers: 0}}", "trainer.eval_interval=5ba",
        f"trainer.save_folder={folder}", f"trainer.save_interval={batches}ba", f"trainer.max_duration={batches}ba",
        "trainer.progress_bar=false", f"loggers={{file: {{filename: '{folder}-{batches}.log', flush_interval: 1}}}}",
    ]  # fmt: skip
    if way.startswith("fsdp"):
        overrides.append("fsdp={}")
    if way.endswith("compiled"):
        overrides.append("trainer.compile_config={}")
    if train.main([QUICKSTART, *overrides]) != 0:
        raise SystemExit(f"{way}: {folder.name} failed at {batches} batches")


def content(folder: Path, way: str) -> dict:
    place = folder / newest(LocalFolder(str(folder)))
    if way.startswith("fsdp"):
        return load_sharded(place, lambda name: "CheckpointSaver" not in name)
    found = load_file(place)
    found["state"]["callbacks"].pop("CheckpointSaver")  # it counts the checkpoints, of which one has more
    return found


def losses(*logs: Path) -> list[str]:
    return [loss for log in logs for loss in re.findall(r"loss/train/total: (\S+)", log.read_text())]


def main(shards: str, top: str, ways: list[str]) -> None:
    faults = []
    for way in ways:
        whole = Path(top, way, "whole")
        run(shards, whole, way, 14)
        for moment, batch in MOMENTS.items():
            folder = Path(top, way, moment)
            run(shards, folder, way, batch)
            run(shards, folder, way, 14)
            if dist.get_global_rank() == 0:
                found = differences(content(whole, way), content(folder, way))
                logs = [Path(f"{folder}-{batches}.log") for batches in (batch, 14)]
                if losses(*logs) != losses(Path(f"{whole}-14.log")):
                    found.append("the logged losses")
                faults += [f"{way}, {moment}: {name}" for name in found]
                print(f"{way}, {moment}: {len(found)} differences", flush=True)
    if faults:
        raise SystemExit("\n".join(faults[:20]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
