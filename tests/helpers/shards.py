"""What a folder of shards holds."""

import json
from pathlib import Path

from streaming.base.format import reader_from_json

from sit_composer.data.spec import DataSpec


def read(folder):
    """The spec, and (image, label) of every sample that the index names."""
    shards = json.loads((folder / "index.json").read_text())["shards"]
    readers = [reader_from_json(str(folder), None, shard) for shard in shards]
    samples = [(sample["image"], sample["label"]) for reader in readers for sample in reader]
    return DataSpec.from_json((folder / "spec.json").read_text(), "spec.json"), samples


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
