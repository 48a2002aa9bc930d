"""Compares decoding and cropping with ADM's, in speed and in result:   python tests/benchmarks/crop.py

Makes JPEGs of scikit-learn's photographs in several sizes. Decodes each on one thread and crops it to 256 x 256: with
PIL, as ADM does, and with `sit_composer.data.pictures`, in turn. Prints a Markdown table: the median CPU time per
image, how many times as fast ours is, and the largest difference between the crops, in levels of 255.
"""

import argparse
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

sys.path.insert(0, str(Path(__file__).parents[2]))  # of the package `tests`, which is not installed

from sit_composer.data.pictures import center_crop, decode_image
from tests.helpers.images import adm_center_crop

SIZES = [(500, 375), (375, 500), (1200, 900), (1201, 901), (3000, 2000)]
TARGET = 256


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8, help="for each size (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print("| image | ADM's, ms | ours, ms | times as fast | difference |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for size in SIZES:
        files = [jpeg(photograph, size) for photograph in load_sample_images().images]
        times = [[cpu_time(way, files) for way in (theirs, ours)]]  # warms up
        start = time.monotonic()
        while len(times) < 6 or time.monotonic() - start < args.seconds:
            times.append([cpu_time(way, files) for way in (theirs, ours)])
        a, b = (1000 / len(files) * median(column) for column in zip(*times[1:], strict=True))
        off = max(np.abs(ours(file).astype(int) - theirs(file)).max() for file in files)
        print(f"| {size[0]} × {size[1]} | {a:.2f} | {b:.2f} | {a / b:.2f} | {off} |")
    return 0


def jpeg(photograph: np.ndarray, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(photograph).resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=95)
    return file.getvalue()


def theirs(file: bytes) -> np.ndarray:
    """uint8 (H, W, C), as ADM's loader has it."""
    with Image.open(io.BytesIO(file)) as picture:
        picture.load()
        return adm_center_crop(picture.convert("RGB"), TARGET)


def ours(file: bytes) -> np.ndarray:
    return center_crop(decode_image(file, 3), TARGET).permute(1, 2, 0).numpy()


def cpu_time(way: Callable[[bytes], np.ndarray], files: list[bytes]) -> float:
    """Seconds of this thread; other programs cannot add to them."""
    start = time.thread_time()
    for file in files:
        way(file)
    return time.thread_time() - start


if __name__ == "__main__":
    sys.exit(main())
