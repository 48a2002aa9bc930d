"""The loader of latents, beside what a step of training takes."""

import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from tests.benchmarks.gpu.harness import Result, Rows, Setting, has, need

COLUMNS = {"moments": "ndarray:float16:8,32,32", "moments_flip": "ndarray:float16:8,32,32", "label": "int"}
AUTOENCODER = {"name": "-", "scale": 0.18215, "shift": 0.0, "channels": 4, "downsample": 8}


def rows(setting: Setting) -> Rows:
    if has("streaming"):
        from sit_composer import lean  # which needs what only streaming needs

        lean.load("streaming")  # takes seconds, which aren't a row's
    folder = tempfile.TemporaryDirectory()  # removed with the process
    return {f"latents, {n} workers": (50, partial(measure, setting, folder, n)) for n in (4, 8)}


def measure(setting: Setting, folder: tempfile.TemporaryDirectory, workers: int) -> Result:
    """Samples per second that reach the device, beside those that the steps took; the faster epoch of two."""
    need("streaming")
    from sit_composer.data.loader import build_loader  # optional: streaming
    from sit_composer.data.stream import load_spec

    count, batch = (64, 16) if setting.tiny else (40_000, 256)
    workers = 1 if setting.tiny else workers
    place = Path(folder.name) / "shards"
    if not place.exists():
        write(count, place)
    spec = load_spec(None, str(place))
    loader = build_loader(None, str(place), spec=spec, batch_size=batch, flip=True, num_workers=workers)
    seconds = []
    for _ in range(2 if setting.tiny else 3):
        start, came = time.perf_counter(), 0
        for parts in loader:
            moved = {name: tensor.to(setting.device, non_blocking=True) for name, tensor in parts.items()}
            came += len(moved["label"])
        seconds.append(time.perf_counter() - start)
        if came < count - batch:
            raise RuntimeError(f"got {came} samples, expected {count}")
    loader.stop()
    had = came / min(seconds[1:])  # the first starts the workers
    needed = {key: fastest(setting, size) for key, size in (("needed_b", "B/2"), ("needed_xl", "XL/2"))}
    most = max((rate for rate in needed.values() if rate), default=None)
    return {"had": had, **needed, "ratio": had / most if most else None}


def fastest(setting: Setting, size: str) -> float | None:
    """The images per second of a size's fastest step, as measured before."""
    rates = [row.get("images_per_second") for name, row in setting.done.items() if name.startswith(f"{size} step")]
    return max((rate for rate in rates if rate), default=None)


def write(count: int, folder: Path) -> None:
    """Shards of random latents of 256x256 images."""
    from streaming import MDSWriter  # optional

    from sit_composer.data.spec import SPEC_NAME, DataSpec

    random = np.random.default_rng(0)
    moments = random.standard_normal((64, 2, 8, 32, 32)).astype(np.float16)  # no two neighbours alike
    with MDSWriter(out=str(folder), columns=COLUMNS, hashes=["xxh64"]) as writer:
        for index in range(count):
            plain, flipped = moments[index % len(moments)]
            writer.write({"moments": plain, "moments_flip": flipped, "label": index % 1000})
    counts = [len(range(label, count, 1000)) for label in range(1000)]
    classes = {"num_classes": 1000, "classes": [str(label) for label in range(1000)], "class_counts": counts}
    spec = DataSpec(kind="latents", image_size=256, samples=count, channels=4, autoencoder=AUTOENCODER, **classes)
    (folder / SPEC_NAME).write_text(spec.to_json())
