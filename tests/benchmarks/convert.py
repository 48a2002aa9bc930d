"""Measures the conversion to shards, and compares it with plain loops.

    python tests/benchmarks/convert.py [--pictures 8000] [--rounds 5] [--latents 16] [--vae sd] [--image-size 256]

The images are crops of scikit-learn's photographs, 500x375, as JPEG in a Parquet file. All sides run in this process,
in turn, after their imports; the medians are printed, with the least and the most.

pixels: `to_mds.py`, and a loop that reads the Parquet file and gives each row to streaming's MDSWriter. The limit is
  PIL's decoding alone, by as many processes, of images in memory; the processes' start is not counted, ours is.
latents: `to_mds.py --latents`, and datasets -> PIL -> ToTensor -> vae.encode, one image at a time and then its
  mirror image, on a GPU if there is one. The autoencoder has Stable Diffusion's architecture, or a narrower one,
  with random weights. On a CPU, the loop's GFLOP/s are compared with those of a matrix product on all cores, an upper
  bound. The share of the time in which the encoders work (one per core, or two on a GPU) is measured too.
"""

import argparse
import io
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # before this folder, whose convert.py is not the package
WIDTHS = {"sd": (128, 256, 512, 512), "quarter": (32, 64, 128, 128), "tiny": (8, 8, 8, 8)}
SD = {
    "layers_per_block": 2, "norm_num_groups": 8, "latent_channels": 4, "scaling_factor": 0.18215,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


def make_table(path: Path, count: int) -> None:
    """Photographs' random crops, 500×375, in row groups of 100 as the Hub's data sets have them."""
    from sklearn.datasets import load_sample_images

    photographs, rng, files = load_sample_images().images, np.random.default_rng(0), []
    for number in range(count):
        photograph = photographs[number % 2]
        top, left = (
            int(rng.integers(0, side - crop)) for side, crop in zip(photograph.shape, (375, 500), strict=False)
        )
        file = io.BytesIO()
        Image.fromarray(photograph[top : top + 375, left : left + 500]).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    table = pa.table({"image": files, "label": rng.integers(0, 10, count)})
    pq.write_table(table, path, row_group_size=100, compression="none")


def raw(table: Path, out: Path) -> None:
    """Reads rows, and writes them to MDS with hashes."""
    from streaming import MDSWriter

    with MDSWriter(out=str(out), columns={"image": "bytes", "label": "int"}, hashes=["xxh64"]) as writer:
        for batch in pq.ParquetFile(table).iter_batches(64):
            for row in batch.to_pylist():
                writer.write(row)


def ours(*options: str) -> Callable[[Path, Path], None]:
    """`to_mds.py` with those options."""

    def run(table: Path, out: Path) -> None:
        from convert import to_mds

        with open(os.devnull, "w") as nothing:
            streams, (sys.stdout, sys.stderr) = (sys.stdout, sys.stderr), (nothing, nothing)
            try:
                code = to_mds.main([str(table), "--out", str(out), *options])
            finally:
                sys.stdout, sys.stderr = streams
        if code != 0:
            raise SystemExit(f"to_mds.py {' '.join(options)} ended with {code}")

    return run


def decode_alone(workers: int) -> Callable[[Path, Path], float]:
    """Decodes all images in so many processes, and does nothing else. Returns the seconds."""

    def run(table: Path, out: Path) -> float:
        context = multiprocessing.get_context("spawn")
        ready, results = context.Barrier(workers), context.Queue()
        shares = [(table, share, workers, ready, results) for share in range(workers)]
        processes = [context.Process(target=decode_share, args=share) for share in shares]
        for process in processes:
            process.start()
        starts, ends = zip(*(results.get() for _ in processes), strict=True)
        for process in processes:
            process.join()
        return max(ends) - min(starts)

    return run


def decode_share(table: Path, share: int, of: int, ready: Any, results: Any) -> None:
    files = pq.read_table(table)["image"].to_pylist()[share::of]
    ready.wait()
    start = time.time()
    for file in files:
        with Image.open(io.BytesIO(file)) as image:
            image.load()
    results.put((start, time.time()))


def obvious(vae: str, size: int) -> Callable[[Path, Path], None]:
    """The plain loop: one image at a time, and then its mirror image."""

    def run(table: Path, out: Path) -> None:
        import datasets
        import torch
        from diffusers import AutoencoderKL
        from torchvision import transforms

        datasets.disable_progress_bars()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False).eval().to(device)
        rows = datasets.load_dataset("parquet", data_files=str(table), split="train", cache_dir=str(out / "cache"))
        rows = rows.cast_column("image", datasets.Image())
        to_tensor = transforms.Compose([
            transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor(), transforms.Normalize(0.5, 0.5),
        ])  # fmt: skip
        with torch.no_grad():
            for number, row in enumerate(rows):
                picture = to_tensor(row["image"])[None].to(device)
                sides = [model.encode(side).latent_dist for side in (picture, picture.flip(-1))]
                moments = [torch.cat([side.mean, side.std], 1).half().cpu().numpy() for side in sides]
                np.savez(out / f"{number}.npz", moments=moments[0], moments_flip=moments[1], label=row["label"])

    return run


def compare(
    sides: dict[str, Callable[[Path, Path], float | None]], table: Path, rounds: int, top: Path
) -> dict[str, list[float]]:
    """Seconds of each side in each round, or what it says itself; the sides take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            with tempfile.TemporaryDirectory(dir=top) as folder:
                start = time.perf_counter()
                told = side(table, Path(folder, "out") if "to_mds" in name else Path(folder))
                if turn:  # the first round only warms up
                    seconds[name].append(told or time.perf_counter() - start)
    return seconds


def show(what: str, seconds: dict[str, list[float]], count: int) -> None:
    """Prints a table of medians; the ratio is to the first side."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians.values()))
    print(f"\n| {what} | images/s | least to most | ratio |\n| --- | ---: | ---: | ---: |")
    for name, median in medians.items():
        least, most = (count / f(seconds[name]) for f in (max, min))
        print(f"| {name} | {count / median:.2f} | {least:.2f} – {most:.2f} | {first / median:.2f} |")


def busy(table: Path, vae: str, options: list[str], top: Path) -> float:
    """The share of the time, from the first batch to the end of the last, in which the encoders compute."""
    from convert.kinds import latents

    spans, encode, at_once = [], latents.Latents._moments, []

    def timed(self: latents.Latents, pictures: list[object]) -> object:
        start = time.perf_counter()
        result = encode(self, pictures)
        spans.append((start, time.perf_counter()))
        at_once[:] = [self.at_once]
        return result

    latents.Latents._moments = timed
    try:
        with tempfile.TemporaryDirectory(dir=top) as folder:
            ours("--latents", "--vae", vae, *options)(table, Path(folder, "out"))
    finally:
        latents.Latents._moments = encode
    first, last = min(start for start, _ in spans), max(end for _, end in spans)
    return sum(end - start for start, end in spans) / (last - first) / at_once[0]


def arithmetic(vae: str, size: int, pictures_per_second: float) -> tuple[float, float]:
    """GFLOP/s of encoding that many images and mirror images per second, and of a float32 matrix product."""
    import torch
    from diffusers import AutoencoderKL
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False).encode(torch.zeros(1, 3, size, size))
    matrix, seconds = torch.randn(2048, 2048), []
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2 * counter.get_total_flops() * pictures_per_second / 1e9, 2 * 2048**3 / min(seconds) / 1e9


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=8000, help="number of images whose bytes are kept; 0: none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latents", type=int, default=16, help="number of images that are encoded; 0: none")
    parser.add_argument("--vae", choices=WIDTHS, default="sd", help="the autoencoder's channels: %(choices)s")
    parser.add_argument("--image-size", type=int, default=256)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        if args.pictures:
            table = top / "pictures.parquet"
            make_table(table, args.pictures)
            sides = {
                "pyarrow -> MDSWriter": raw,
                "to_mds.py --check header --workers 0": ours("--check", "header", "--workers", "0"),
            }
            show("pixels, not decoded", compare(sides, table, args.rounds, top), args.pictures)
            for cores in dict.fromkeys((os.cpu_count() or 1, 1)):
                sides = {
                    f"PIL's decoding alone, processes: {cores}": decode_alone(cores),
                    f"to_mds.py --workers {0 if cores == 1 else cores}": ours(
                        "--workers", str(cores if cores > 1 else 0)
                    ),
                }
                show("pixels, each decoded", compare(sides, table, args.rounds, top), args.pictures)
        if not args.latents:
            return 0
        import torch
        from diffusers import AutoencoderKL

        torch.manual_seed(0)
        vae = str(top / "vae")
        AutoencoderKL(block_out_channels=WIDTHS[args.vae], **SD).save_pretrained(vae)
        small = top / "few.parquet"
        make_table(small, args.latents)
        options = ["--image-size", str(args.image_size), "--workers", str(os.cpu_count())]
        loop = "datasets -> PIL -> ToTensor -> vae.encode, one at a time"
        sides = {loop: obvious(vae, args.image_size), "to_mds.py --latents": ours("--latents", "--vae", vae, *options)}
        seconds = compare(sides, small, args.rounds, top)
        show(f"latents, {args.vae}, {args.image_size}x{args.image_size}", seconds, args.latents)
        if not torch.cuda.is_available():
            done, most = arithmetic(vae, args.image_size, args.latents / statistics.median(seconds[loop]))
            print(f"\nthe loop's encoder does {done:.0f} GFLOP/s; a matrix product on this CPU does {most:.0f}")
        print(f"\nthe encoders are at work {busy(small, vae, options, top):.1%} of the time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
