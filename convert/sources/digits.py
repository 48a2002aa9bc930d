"""scikit-learn's 1,797 digits."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import sklearn
from PIL import Image
from sklearn.datasets import load_digits

from convert.sources.parts import Part, Sample, SourcePlan, cut, cut_off


def plan_source(description: dict[str, Any], limit: int | None) -> SourcePlan:
    """The plan of the digits, or of the first ``limit`` of them."""
    digits = load_digits()
    classes = ["all"] if "label_column" in description else [str(name) for name in digits.target_names]
    file = {"name": f"digits of scikit-learn {sklearn.__version__}", "bytes": digits.images.nbytes, "modified": None}
    return SourcePlan([file], classes, cut_off(cut(0, [1] * len(digits.target)), limit))


def read_part(description: dict[str, Any], plan: SourcePlan, part: Part) -> Iterator[Sample]:
    """Images of 8×8 grey pixels as PNG, with the values 0 to 16 scaled to 8 bits."""
    data = load_digits()
    for row in range(part.start, part.stop):
        png = io.BytesIO()
        Image.fromarray(np.round(data.images[row] * (255 / 16)).astype(np.uint8)).save(png, "PNG")
        yield Sample(f"digits row {row}", png.getvalue(), 0 if "label_column" in description else int(data.target[row]))
