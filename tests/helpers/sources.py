"""Sources of images, for conversions."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from convert.sources.registry import describe, plan_source, read_part


def read_source(source, **options) -> tuple[list[str] | None, list[tuple]]:
    """The classes, and (image, label) of every sample."""
    description = describe(str(source), **options)
    plan = plan_source(description)
    return plan.classes, [(s.image, s.label) for part in plan.parts for s in read_part(description, plan, part)]


def write_parquet(path: Path, images: list[bytes | None], labels, **options) -> Path:
    """A Parquet file with the columns image and label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": pa.array(images, pa.binary()), "label": labels}), path, **options)
    return path


def write_folder(root: Path, **classes: list[bytes]) -> Path:
    """A folder of images, ROOT/CLASS/0.jpg and so on."""
    for name, images in classes.items():
        (root / name).mkdir(parents=True)
        for number, data in enumerate(images):
            (root / name / f"{number}.jpg").write_bytes(data)
    return root
