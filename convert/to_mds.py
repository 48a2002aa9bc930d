"""Converts labelled images to MDS shards for training.

    python convert/to_mds.py SOURCE --out URI

SOURCE is one of
  a Parquet or Arrow file, a folder of them, or a glob in quotes; each also as s3://BUCKET/…
  WebDataset tars, likewise
  a folder of images, SOURCE/CLASS/IMAGE, in any format that Pillow reads
  a Hugging Face data set: a folder that `save_to_disk` wrote, or a name on the Hub
  the word digits: the 1,797 small images that scikit-learn ships
URI is a new folder, or s3://BUCKET/PREFIX (credentials as for boto3; S3_ENDPOINT_URL, or AWS_ENDPOINT_URL, for a store
other than AWS), gs://BUCKET/PREFIX or az://CONTAINER/PREFIX (docs/data.md has their credentials).

The images' own bytes are kept, and each image is decoded once to check it. With --image-size they are cropped and
encoded again; with --latents an autoencoder's latents are stored instead. Labels are integers from 0, class names, or
strings, which are numbered in sorted order; --class-names gives names to them. `spec.json` describes the shards and
counts what was left out; `index.json` is written last, when all are whole.

After any interruption, rerun the same command; it resumes, and the result is the same to the byte. If the conversion is
finished, the command says so.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

if not __package__:  # run by its path, Python looks for modules in this folder instead of the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert.options import parse, what_is_made
from convert.sources.registry import describe
from sit_composer.cli import announce, hand_over, is_remote, run_command
from sit_composer.errors import EVICTED


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 2 for bad input or output, 1 for a failing disk or network."""
    args = parse(argv, __doc__)
    if args.vae and os.path.isdir(folder := os.path.expanduser(args.vae)):
        args.vae = os.path.abspath(folder)  # `spec.json` may be read in another working folder
    return run_command(lambda: _convert(args), "interrupted; run the same command again to resume")


def _convert(args: argparse.Namespace) -> int:
    if is_remote(args.source):  # which may take minutes, with a slow or unreachable store
        announce("the source's list of objects")
    columns = args.image_column, args.label_column
    source = describe(args.source, args.format, *columns, args.split, args.config, args.streaming)
    if args.limit:
        source["limit"] = args.limit
    args.described = source | what_is_made(args)
    return hand_over("convert.engine.conversion", args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EVICTED))  # so that SIGTERM also clears up
    sys.exit(main())
