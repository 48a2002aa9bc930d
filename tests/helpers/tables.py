"""A Parquet file of digits."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits

from tests.helpers.images import png

ROWS = 600


def write_table(path: Path) -> Path:
    """Writes ROWS digits in row groups of 25."""
    digits = load_digits()
    images = [png((image * 15).astype("uint8")) for image in digits.images[:ROWS]]
    pq.write_table(pa.table({"image": images, "label": digits.target[:ROWS]}), path, row_group_size=25)
    return path
