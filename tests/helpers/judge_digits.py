"""Judges drawn digits:   python tests/helpers/judge_digits.py SAMPLES.npz [--at-least PERCENT]

A support vector machine that learned scikit-learn's real digits says how many of the samples it reads as the class
that was asked for.
"""

import argparse
import sys

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC


def judge(pictures: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Percentages read right: of real digits held out, and of the pictures, uint8 (N, 8, 8, 3)."""
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.5, random_state=0, stratify=y)
    reader = SVC(gamma=0.001).fit(x_train, y_train)
    drawn = pictures[..., 0].reshape(len(pictures), 64) * (16 / 255)  # load_digits has levels 0 to 16
    return 100 * reader.score(x_test, y_test), 100 * reader.score(drawn, labels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", metavar="SAMPLES.npz")
    parser.add_argument("--at-least", type=float, default=0, metavar="PERCENT", help="exit with 1 if fewer are right")
    args = parser.parse_args()
    with np.load(args.samples) as samples:
        real, drawn = judge(samples["arr_0"], samples["labels"])
        count = len(samples["labels"])
    print(f"an SVC that reads {real:.1f} % of held-out real digits reads {drawn:.1f} % of {count} samples as asked for")
    return 0 if drawn >= args.at_least else 1


if __name__ == "__main__":
    sys.exit(main())
