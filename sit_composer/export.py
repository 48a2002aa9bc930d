"""Writes weights as other programs read them:   python -m sit_composer.export CHECKPOINT --out DIR [--hub]

DIR/checkpoint-STEP/ gets
  model.safetensors   the training weights, with the authors' names
  ema.safetensors     their average
  ema.pt              the average again, as a bare state dict that the authors' code loads (their sample.py's --ckpt
                      builds a network without learn_sigma, and fails on one with it, even on their own train.py's)
  config.json         what the weights mean: network, transport, autoencoder, classes
  trainer_state.json  steps, epochs and samples trained; the hashes of the source and of the files
If training kept several averages, ema.safetensors and ema.pt have the first, ema-NAME.safetensors the others.
With --hub, DIR/hub-STEP/ gets a model's folder for the Hugging Face Hub: the average as model.safetensors,
config.json, trainer_state.json, and README.md, the model card. `huggingface-cli upload OWNER/NAME DIR/hub-STEP`
uploads it. If training had the autoencoder in a folder, upload that too, and name it by --vae-id. `sit_composer.sample`
and `SiT.from_pretrained` take either folder. Existing folders are left unchanged.
"""

import argparse
import sys

from sit_composer.choices import check_weights
from sit_composer.cli import check_checkpoint, hand_over, is_hub_name, make_parser, refuse_idle, run_command
from sit_composer.outputs import check_local


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 if everything is written, 2 for a mistake that it names."""
    parser = make_parser("python -m sit_composer.export", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's checkpoint file or folder, or the authors'")
    parser.add_argument("--out", required=True, metavar="DIR", help="parent of the written folders")
    parser.add_argument("--hub", action="store_true", help="write a folder for the Hugging Face Hub as well")
    vae_id = "for the Hub's folder: the autoencoder's name on the Hub, if training had it in a folder"
    parser.add_argument("--vae-id", metavar="OWNER/NAME", help=vae_id)
    weights = "for the Hub's folder: training, or an average, such as ema:0.999 or ema:power0.05 (the first)"
    parser.add_argument("--weights", metavar="NAME", help=weights)
    spec = "of released weights for other latents than the authors', as LightningDiT's: spec.json of shards of those"
    parser.add_argument("--spec", metavar="FILE", help=spec)
    args = parser.parse_args(argv)
    refuse_idle(parser, args, ("vae_id weights", args.hub, "without --hub"))
    if args.vae_id is not None and not is_hub_name(args.vae_id):
        parser.error(f"argument --vae-id: got {args.vae_id!r}, expected a name on the Hub, such as OWNER/NAME")
    return run_command(lambda: hand_over("sit_composer.checkpoint.export", checked(args), "torch"))


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """The options, of which the checkpoint is on disk, and the weights' name can be one."""
    if args.weights is not None:
        check_weights("--weights", args.weights)
    check_local("--out", args.out)
    return check_checkpoint(args)


if __name__ == "__main__":
    sys.exit(main())
