"""Runs of a small network with frozen weights that start from those of another run:

    composer -n N -m tests.helpers.start_ranks SHARDS BEFORE TOP

Each WAY, ddp and fsdp, leaves TOP/WAY/still, after a step that changes nothing; whole, after two steps; and halves,
which was stopped and resumed between them. The shards have the classes 9, yak and 1.
"""

import sys

from tests.helpers import ranks
from tests.helpers.runs import QUICKSTART, TINY, train_at_once

WAYS = {"ddp": "fsdp=null", "fsdp": "fsdp={}"}
STEPS = (("still", 1, ["optimizer.lr=1e-30"]), ("whole", 2, []), ("halves", 1, []), ("halves", 2, []))
FREEZE = "freeze=[t_embedder.*, 'blocks.*.attn.*']"


def main(shards: str, before: str, top: str) -> None:
    common = [QUICKSTART, *TINY, f"data.local={shards}", "model.num_classes=3", f"init_from={before}", FREEZE]
    common += ["scheduler={constant: {}}", "optimizer.name=muon", "trainer.progress_bar=false"]
    for way, sharded in WAYS.items():
        for name, batches, more in STEPS:
            places = [f"trainer.save_folder={top}/{way}/{name}", f"trainer.max_duration={batches}ba"]
            if train_at_once([*common, sharded, *places, *more], ranks.main):
                raise SystemExit(f"{way}: {name} failed at {batches} batches")


if __name__ == "__main__":
    main(*sys.argv[1:])
