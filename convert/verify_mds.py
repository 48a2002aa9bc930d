"""Checks a finished conversion.

    python convert/verify_mds.py URI [--grid FILE.png]

URI is what `to_mds.py --out` wrote: a folder or s3://BUCKET/PREFIX (S3_ENDPOINT_URL for another store than AWS), whose
shards are fetched one at a time. It checks that the index and the spec can be read and are safe; that every shard is
there with its size and its hash, and none besides; that samples and classes are as many as the spec says, and in the
source, with --source; that every picture decodes and has its size; and that latents are finite, with deviations over 0,
and after scale and shift have about the mean and deviation that training expects, for pictures and mirror images alike.

The exit code is 0 if all is well; 1 if not, with one line a fault (the first 20 of them); 2 for a mistaken command.
"""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A script run by its path finds its own folder first, where this package's modules would shadow others.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from sit_composer.data.spec import SPEC_NAME, DataSpec
from sit_composer.errors import UserError

if TYPE_CHECKING:
    from streaming.base.format import Reader
    from streaming.base.storage import CloudDownloader

    from convert.kinds.checks import LatentCheck, PixelCheck

SHARD = re.compile(r"(again-)?shard\.[\d.]+\.mds")
FAULTS_SHOWN = 20
ATTEMPTS = 5  # to fetch a file, with growing pauses: a quarter of a minute


class Faults:
    """What is wrong, one line each, of which the first are printed as they are found."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, line: object) -> None:
        self.count += 1
        if self.count <= FAULTS_SHOWN:
            print("fault:", " ".join(str(line).split()))


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = _parse(argv)
    faults = Faults()
    try:
        report = verify(args, faults)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    for line in report:
        print(line)
    if faults.count:
        more = f", of which {FAULTS_SHOWN} are shown" if faults.count > FAULTS_SHOWN else ""
        print(f"{args.uri}: {faults.count} fault{'s' * (faults.count != 1)}{more}")
        return 1
    print(f"{args.uri}: all is well")
    return 0


def verify(args: argparse.Namespace, faults: Faults) -> list[str]:
    """Adds the faults, and returns the lines of the report.

    Raises:
        UserError: if the options don't fit, or the store can't be read.
    """
    remote, local = (args.uri, "") if args.uri.startswith("s3://") else (None, args.uri)
    files = _listing(args.uri)
    from sit_composer.data.spec import INDEX_NAME  # seconds
    from sit_composer.data.stream import DataError, load_spec, read_text, safe_shards  # seconds

    missing = [name for name in (INDEX_NAME, SPEC_NAME) if name not in files]
    for name in missing:
        faults.add(f"{args.uri}/{name} is missing: the conversion was not finished")
    if missing:
        return []
    try:
        spec = load_spec(remote, local)
        shards = safe_shards(*read_text(remote, local, INDEX_NAME), local, spec.kind)
    except DataError as error:
        faults.add(error)
        return []
    listed = {shard.raw_data.basename for shard in shards}
    for name in sorted(files):
        if SHARD.fullmatch(name) and name not in listed:
            faults.add(f"{args.uri}/{name} is not in {INDEX_NAME}: delete it, or convert again")
    samples = sum(shard.samples for shard in shards)
    if not samples:
        faults.add(f"{args.uri}/{INDEX_NAME} lists no sample")
    if samples != spec.samples or sum(spec.class_counts) != spec.samples:
        counted = sum(spec.class_counts)
        faults.add(f"{INDEX_NAME} lists {samples} samples; {SPEC_NAME} says {spec.samples}, and {counted} by class")
    if len(set(spec.classes)) < len(spec.classes):
        faults.add(f"{SPEC_NAME} names a class twice")
    content = _content(spec, args, faults)
    counts = _read_all(args.uri, shards, files, spec, content, args.sample, faults)
    report = [_inventory(spec, shards)]
    if counts is not None:
        _compare(counts, spec.class_counts, spec, SPEC_NAME, faults)
        report += content.finish()
        if args.source:
            report.append(_check_source(spec, faults))
    if args.grid and content.write_grid(args.grid):
        report.append(f"{args.grid}: look at it")
    return report


def _read_all(
    uri: str,
    shards: "list[Reader]",
    files: dict[str, int],
    spec: DataSpec,
    content: "PixelCheck | LatentCheck",
    sample: int | None,
    faults: Faults,
) -> list[int] | None:
    """Checks each shard and what is in it; returns the samples by class, or None if a shard can't be read."""
    from tqdm import tqdm

    total = sum(shard.samples for shard in shards)
    chosen = None if sample is None or sample >= total else {i * total // sample for i in range(sample)}
    counts: list[int] | None = [0] * spec.num_classes
    first = 0
    size = sum(shard.raw_data.bytes for shard in shards)
    with tqdm(total=size, unit="B", unit_scale=True, disable=None) as progress:
        for number, shard in enumerate(shards):
            progress.set_postfix_str(f"{number + 1} of {len(shards)} shards")
            data = _read_shard(uri, shard, files, faults)
            try:
                rows = None if data is None else list(_rows(shard, data))
            except Exception as error:  # whatever its decoders raise
                faults.add(f"{uri}/{shard.raw_data.basename} is no MDS shard of these columns ({error})")
                rows = None
            if rows is None:
                counts = None
            for i, row in enumerate(rows or []):
                label = int(row["label"])
                where = f"{shard.raw_data.basename} sample {i}"
                if not 0 <= label < spec.num_classes:
                    faults.add(f"{where}: the label is {label}, but there are {spec.num_classes} classes")
                elif counts is not None:
                    counts[label] += 1
            wanted = [i for i in range(len(rows or [])) if chosen is None or first + i in chosen]
            content.check([(f"{shard.raw_data.basename} sample {i}", rows[i]) for i in wanted])
            first += shard.samples
            progress.update(shard.raw_data.bytes)
    return counts


def _read_shard(uri: str, shard: "Reader", files: dict[str, int], faults: Faults) -> bytes | None:
    """The bytes of a shard, if they are right."""
    from sit_composer.data.stream import shard_fault, shard_files

    name = shard.raw_data.basename
    if len(shard_files(shard)) != 1:
        faults.add(f"{uri}/{name} is compressed, which to_mds.py doesn't do")
        return None
    if name not in files:
        faults.add(f"{uri}/{name} is missing")
        return None
    if not shard.raw_data.hashes:
        faults.add(f"{uri}/{name} has no hash in the index: what changed in it cannot be seen")
    if not uri.startswith("s3://"):
        fault, folder = shard_fault(shard, uri), uri
        if not fault:
            return Path(uri, name).read_bytes()
    else:
        with tempfile.TemporaryDirectory(prefix="verify_mds-") as folder:
            path = Path(folder, name)
            fault = fetch(f"{uri}/{name}", path) or shard_fault(shard, folder)
            if not fault:
                return path.read_bytes()
    faults.add(fault.replace(folder, uri, 1))
    return None


def fetch(uri: str, path: Path) -> str | None:
    """Copies a file of an object store; returns what is wrong if it can't, after some attempts."""
    from streaming.base.util import retry

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        retry(num_attempts=ATTEMPTS)(lambda: _downloader().download(uri, str(path), 60))()
    except Exception as error:  # boto's, urllib's and the disk's
        return f"cannot read {uri} ({type(error).__name__}: {error})"
    return None


@cache
def _downloader() -> "CloudDownloader":
    """One for all files: each has connections of its own."""
    from streaming.base.storage import CloudDownloader

    return CloudDownloader.get("s3://")


def _rows(shard: "Reader", data: bytes) -> Iterator[dict[str, Any]]:
    """The samples of a shard: their number, where each begins, where the last ends, and then the samples."""
    import numpy as np

    (count,) = np.frombuffer(data, np.uint32, 1)
    if count != shard.samples:
        raise ValueError(f"it has {count} samples; the index says {shard.samples}")
    bounds = np.frombuffer(data, np.uint32, count + 1, 4).tolist()
    if bounds != sorted(bounds) or bounds[-1] != len(data):
        raise ValueError("its table of samples is broken")
    for begin, end in pairwise(bounds):
        yield shard.decode_sample(data[begin:end])


def _compare(counts: list[int], others: Iterable[int], spec: DataSpec, where: str, faults: Faults) -> None:
    for label, (ours, theirs) in enumerate(zip(counts, others, strict=True)):
        if ours != theirs:
            faults.add(f"class {label} ({spec.classes[label]}) has {ours} samples in the shards; {where} says {theirs}")


def _check_source(spec: DataSpec, faults: Faults) -> str:
    """Counts the source's pictures by class, as they are read now."""
    from convert.sources.registry import InputError, plan_source, read_part

    try:
        plan = plan_source(spec.source, spec.source.get("limit"))
        counts = [0] * spec.num_classes
        if plan.classes is not None and plan.classes != spec.classes:
            faults.add(f"the source's classes are {plan.classes[:5]} …; {SPEC_NAME} says {spec.classes[:5]} …")
            return f"source: {spec.source['path']} has other classes"
        for part in plan.parts:
            for sample in read_part(spec.source, plan, part):
                if not 0 <= sample.label < spec.num_classes:
                    raise InputError(f"{sample.where}: the label is {sample.label}")
                counts[sample.label] += 1
    except (InputError, OSError, IndexError) as error:
        raise UserError(f"--source: cannot read it again: {error}") from None
    if not spec.skipped:
        _compare(spec.class_counts, counts, spec, "the source", faults)
    elif sum(counts) - spec.samples != spec.skipped or any(
        a > b for a, b in zip(spec.class_counts, counts, strict=True)
    ):
        faults.add(
            f"the source has {sum(counts)} pictures; {SPEC_NAME} says {spec.samples}, and {spec.skipped} skipped"
        )
    return f"source: {sum(counts)} pictures in {spec.source['path']}, {spec.skipped} skipped"


def _content(spec: DataSpec, args: argparse.Namespace, faults: Faults) -> "PixelCheck | LatentCheck":
    from convert.kinds.checks import LatentCheck, PixelCheck

    if spec.kind == "pixels":
        if args.vae:
            raise UserError("--vae is for latents; these are pictures")
        return PixelCheck(spec, faults.add, bool(args.grid))
    return LatentCheck(spec, faults.add, args.vae, bool(args.grid))


def _inventory(spec: DataSpec, shards: "list[Reader]") -> str:
    size = sum(shard.raw_data.bytes for shard in shards) / 1e6
    counts = spec.class_counts
    each = f"{min(counts)} to {max(counts)} samples" if counts else "none"
    return (
        f"{spec.samples} samples ({spec.kind}) in {len(shards)} shard{'s' * (len(shards) != 1)}, {size:.1f} MB; "
        f"{spec.num_classes} classes of {each}; {spec.skipped} skipped"
    )


def _listing(uri: str) -> dict[str, int]:
    """The names and bytes of all files there."""
    if not uri.startswith("s3://"):
        if not Path(uri).is_dir():
            raise UserError(f"{uri}: no such folder")
        return {entry.name: entry.stat().st_size for entry in Path(uri).iterdir() if entry.is_file()}
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, key = uri.removeprefix("s3://").partition("/")
    prefix = f"{key}/" if key else ""
    try:
        client = boto3.client("s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL"))
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        found = {o["Key"].removeprefix(prefix): o["Size"] for page in pages for o in page.get("Contents", [])}
    except (BotoCoreError, ClientError, ValueError) as error:
        raise UserError(f"cannot read {uri} ({type(error).__name__}: {error})") from None
    if not found:
        raise UserError(f"{uri}: nothing is there")
    return found


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("uri", metavar="URI", help="a folder, or s3://BUCKET/PREFIX")
    add("--sample", type=_positive, metavar="N", help="look into N samples only, evenly spaced (all; hashes: of all)")
    add("--source", action="store_true", help="also count the source's pictures by class, where it can still be read")
    add("--vae", metavar="NAME_OR_PATH", help="of latents: compare and decode with this autoencoder (the spec's)")
    add("--grid", type=Path, metavar="FILE.png", help="a new file: pictures, or decoded latents beside mirrored ones")
    args = parser.parse_args(argv)
    args.uri = args.uri.rstrip("/") or "/"
    if "://" in args.uri and not args.uri.startswith("s3://"):
        parser.error(f"{args.uri}: takes a folder or s3://BUCKET/PREFIX")
    if args.grid and args.grid.exists():
        parser.error(f"--grid: {args.grid} exists; it takes a new file")
    if args.grid and not args.grid.absolute().parent.is_dir():
        parser.error(f"--grid: {args.grid.parent} is no folder")
    return args


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {text}; it takes 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
