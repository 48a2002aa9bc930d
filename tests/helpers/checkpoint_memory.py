"""The training command, which prints what a checkpoint costs in memory:

    composer -n N -m tests.helpers.checkpoint_memory YAML [key=value ...]

Each rank prints a line of JSON for each checkpoint that it saves or resumes from: the bytes of its weights, optimizer
and average; and by how many bytes its memory exceeded, at the most, what it was before: ``resident``, and
``anonymous``, without the pages of a file that is mapped: those are the disk's cache, which all ranks share.
"""

import gc
import json
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from composer.utils import dist

from sit_composer.supervision.supervisor import Supervision
from sit_composer.training import fit
from tests.helpers import ranks


def status(name: str) -> int:
    """Bytes that Linux notes of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def peak(action: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    """The action's result, and by how much its memory exceeded, at the most, what it was before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    resident, most = status("VmRSS"), [status("RssAnon")]
    before, ended = most[0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            most[0] = max(most[0], status("RssAnon"))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        result = action()
    finally:
        ended.set()
        watching.join()
    return result, {"resident": status("VmHWM") - resident, "anonymous": most[0] - before}


def local(tensor: Any) -> int:
    """The bytes that this rank has of a tensor."""
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.numel() * tensor.element_size()


def held(state: Any) -> dict[str, int]:
    """The bytes of this rank's weights, optimizer and average."""
    kept = [c.averages for c in state.callbacks if type(c).__name__ == "EMAWeights"]
    averages = [params.values() for averages in kept for params in averages.values()]
    moments = [
        value for optimizer in state.optimizers for values in optimizer.state.values() for value in values.values()
    ]
    return {
        "weights": sum(map(local, state.model.state_dict().values())),
        "optimizer": sum(map(local, moments)),
        "ema": sum(local(value) for values in averages for value in values),
    }


def tell(event: str, state: Any, extra: dict[str, int]) -> None:
    print(json.dumps({"event": event, "rank": dist.get_global_rank(), **extra, **held(state)}), flush=True)


def save(self: Supervision, saver: Any, before: Any, state: Any, logger: Any) -> None:
    _, extra = peak(partial(SAVE, self, saver, before, state, logger))
    tell("save", state, extra)


def build_trainer(config: Any, resumption: dict[str, Any], **parts: Any) -> Any:
    trainer, extra = peak(partial(BUILD, config, resumption, **parts))
    if "load_path" in resumption:
        tell("resume", trainer.state, extra)
    return trainer


SAVE, BUILD = Supervision._save, fit.build_trainer

if __name__ == "__main__":
    Supervision._save, fit.build_trainer = save, build_trainer
    sys.exit(ranks.main())
