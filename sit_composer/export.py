"""Writes weights as other programs read them:   python -m sit_composer.export CHECKPOINT --out DIR [--hub]

DIR/checkpoint-STEP/ gets
  model.safetensors   the training weights, with the authors' names
  ema.safetensors     their average
  ema.pt              the average once more, a bare state dict, as the authors' code loads it (their sample.py's --ckpt
                      builds a network without learn_sigma, and fails on one with it, on their own train.py's too)
  config.json         what they mean: network, transport, autoencoder, classes
  trainer_state.json  steps, epochs and samples trained; the source's and the files' hashes
and with --hub, DIR/hub-STEP/ gets a model's folder for the Hugging Face Hub: the average as model.safetensors,
config.json, trainer_state.json, and README.md, the model card. `huggingface-cli upload OWNER/NAME DIR/hub-STEP` puts
it there. `sit_composer.sample` and `SiT.from_pretrained` take either folder. What is there already is left as it is.
"""

import argparse
import sys
from pathlib import Path

from sit_composer.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 when all is written, 2 for a mistake that it names."""
    parser = argparse.ArgumentParser(
        prog="python -m sit_composer.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's checkpoint file or folder, or the authors'")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the folders go")
    parser.add_argument("--hub", action="store_true", help="write a folder for the Hugging Face Hub as well")
    args = parser.parse_args(argv)
    try:
        from sit_composer.checkpoint.export import export  # torch: only once the options are right

        export(args.checkpoint, Path(args.out), args.hub)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
