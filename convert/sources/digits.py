"""scikit-learn's 1,797 digits."""

import io
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import sklearn
from PIL import Image
from sklearn.datasets import load_digits

from convert.sources.parts import Part, Sample, SourcePlan, cut, cut_off


def plan_digits(description: dict[str, Any], limit: int | None) -> SourcePlan:
    """scikit-learn's 1,797 digits."""
    digits = load_digits()
    classes = ["all"] if "label_column" in description else [str(name) for name in digits.target_names]
    file = {"name": f"digits of scikit-learn {sklearn.__version__}", "bytes": digits.images.nbytes, "modified": None}
    return SourcePlan([file], classes, cut_off(cut(0, [1] * len(digits.target)), limit))


def read_digits(description: dict[str, Any], plan: SourcePlan, part: Part) -> Iterator[Sample]:
    """Pictures of 8×8 grey pixels, whose values 0 to 16 are spread over 8 bits, as PNG."""
    digits = load_digits()
    rows = enumerate(zip(digits.images, digits.target, strict=True))
    for row, (picture, label) in islice(rows, part.start, part.stop):
        png = io.BytesIO()
        Image.fromarray(np.round(picture * (255 / 16)).astype(np.uint8)).save(png, "PNG")
        yield Sample(f"digits row {row}", png.getvalue(), 0 if "label_column" in description else int(label))
