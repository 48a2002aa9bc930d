"""Trains a small autoencoder on small images:   python -m sit_composer.tiny_autoencoder SHARDS --out FOLDER

SHARDS is a folder of images of one size that convert/to_mds.py made, such as the digits'. FOLDER is then an
AutoencoderKL as diffusers saves it, for convert/to_mds.py --latents --vae FOLDER and for autoencoder.name. Its latents
have 4 channels and half the images' side. A CPU takes a minute for images of 8x8 pixels; for photographs, use a
published autoencoder.
"""

import sys
from pathlib import Path

from sit_composer.choices import COUNT
from sit_composer.cli import hand_over, make_parser, number, run_command
from sit_composer.errors import UserError
from sit_composer.outputs import check_output


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 if the folder is written, 2 for a mistake that it names."""
    parser = make_parser("python -m sit_composer.tiny_autoencoder", __doc__)
    parser.add_argument("shards", metavar="SHARDS", help="a folder of shards of images of one size")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--steps", type=number(COUNT), default=600, metavar="N", help="of 64 images (600)")
    args = parser.parse_args(argv)

    def work() -> None:
        if args.out.exists():
            raise UserError(f"--out: {args.out} exists, expected a new folder")
        check_output("--out", str(args.out), "")
        hand_over("sit_composer.training.tiny_autoencoder", args, "torch", "streaming")

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
