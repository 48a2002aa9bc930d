"""Compares what a network predicts by Fréchet distance:   python tests/benchmarks/predictions.py --out DIR

Trains `yamls/fashion_mnist.yaml` with coarse patches, 14×14 pixels: a token has 196 numbers, twice the network's width.
A velocity or noise has all of these dimensions and must pass through that width; an image has fewer, so that to predict
it was found better (JiT, arXiv 2511.13720). All arms differ only by the prediction and its loss.

What runs, what is measured, and with what, is as for `time_sampling.py`, whose folder DIR may be used too. To run it
piece by piece, name an arm and a seed: what is finished is skipped later, and the table has what is named.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder stands there instead
from tests.benchmarks import time_sampling
from tests.benchmarks.time_sampling import Arms

COARSE = ["model.patch_size=14"]
ARMS: Arms = {  # file name: title, overrides
    "velocity": ("velocity", COARSE),
    "x-as-velocity": (
        "x, loss as velocity (JiT)",
        [*COARSE, "transport.prediction=x", "transport.loss_weight=velocity"],
    ),
    "x": ("x, loss as x", [*COARSE, "transport.prediction=x"]),
    "noise": ("noise", [*COARSE, "transport.prediction=noise"]),
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake or a command that failed, which it names."""
    return time_sampling.main(argv, ARMS, "prediction", __doc__)


if __name__ == "__main__":
    sys.exit(main())
