"""Checks a finished conversion.

    python convert/verify_mds.py URI [--grid FILE.png]

URI is the output of `to_mds.py`: a folder, s3://BUCKET/PREFIX, or another store's URI, whose shards are
fetched one at a time. The command checks that the index and the spec are valid and safe; that every shard is
there with its size and its hash, and no other shard; that samples and classes are as many as the spec says, and as in
the source, with --source; that every image decodes and has its size; and that latents are finite, with positive
deviations, and have about the expected mean and deviation once standardized, for images and mirror images alike; and
that measured statistics are those of the latents, and a teacher's features are finite, and as many as the spec says.
What was left out is reported by reason; with --source also what the source leaves out now.

The exit code is 0 if all is well; 1 if not, with one line per fault (the first 20 of them); 2 for a mistaken command.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run by its path, Python looks for modules in this folder instead of the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert.engine.vae import check_vae
from sit_composer.choices import COUNT
from sit_composer.cli import hand_over, is_remote, make_parser, number, run_command
from sit_composer.clouds import check_store
from sit_composer.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = make_parser("python convert/verify_mds.py", __doc__)
    add = parser.add_argument
    add("uri", metavar="URI", help="a folder, or a URI such as s3://BUCKET/PREFIX")
    add("--sample", type=number(COUNT), metavar="N", help="check N samples only, evenly spaced (all; hashes: of all)")
    add("--source", action="store_true", help="also count the source's images per class, if it can still be read")
    add("--vae", metavar="NAME_OR_PATH", help="for latents: compare and decode with this autoencoder (the spec's)")
    add("--grid", type=Path, metavar="FILE.png", help="a new file: images, or decoded latents beside mirrored ones")
    args = parser.parse_args(argv)
    args.uri = args.uri.rstrip("/") or "/"
    if args.grid and args.grid.exists():
        parser.error(f"--grid: {args.grid} exists, expected a new file")
    if args.grid and not args.grid.absolute().parent.is_dir():
        parser.error(f"--grid: {args.grid.parent} is not a folder")
    return run_command(lambda: _verify(args), "interrupted")


def _verify(args: argparse.Namespace) -> int:
    if is_remote(args.uri):
        check_store(args.uri)
    if not is_remote(args.uri) and not Path(args.uri).is_dir():
        raise UserError(f"{args.uri}: no such folder")
    if args.vae:
        check_vae(args.vae, None)
    return hand_over("convert.engine.verify", args, "torch", "streaming")


if __name__ == "__main__":
    sys.exit(main())
