"""What a folder of shards holds: `spec.json`, which lies beside `index.json`.

`convert/to_mds.py` writes it, last of all; training and sampling read it, and refuse what doesn't fit their config.
Only the standard library is imported here, so that a config can be checked before torch is.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

SPEC_NAME = "spec.json"
INDEX_NAME = "index.json"  # streaming's list of the shards
SPEC_VERSION = 1
AUTOENCODER = {"name": [str], "channels": [int], "downsample": [int], "scale": [int, float], "shift": [int, float]}


@dataclass(frozen=True)
class DataSpec:
    """The contents of a folder of MDS shards.

    Samples of kind ``pixels`` have the columns ``image`` (the original file's bytes, or a cropped PNG or JPEG) and
    ``label`` (int); samples of kind ``latents`` have ``moments`` and ``moments_flip`` (float16, (2·channels, H, W):
    mean, then standard deviation, of the picture and of its mirror image, before scale and shift) and ``label``.
    """

    kind: str  # "pixels" or "latents"
    channels: int  # of a picture (1 grey, 3 RGB), or of a latent (half of the moments' channels)
    image_size: int | None  # side in pixels of every picture; None if they differ (training then crops them)
    num_classes: int  # labels are 0 .. num_classes - 1
    classes: list[str]  # a name for each label
    class_counts: list[int]  # samples of each label
    samples: int  # in all shards together
    skipped: int = 0  # pictures that could not be decoded or encoded, and were left out on request
    source: dict[str, Any] = field(default_factory=dict)  # format, path and columns that the samples came from
    autoencoder: dict[str, Any] | None = None  # {name, scale, shift, channels, downsample} for latents; else None

    def to_json(self) -> str:
        """The text of `spec.json`."""
        return json.dumps({"version": SPEC_VERSION, **dataclasses.asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "DataSpec":
        """Parses `spec.json`, named ``where`` in errors.

        Raises:
            ValueError: if it is not such a file, or of a newer version.
        """
        try:
            content = json.loads(text)
            version = content.pop("version")
            if version != SPEC_VERSION:
                raise ValueError(f"is of version {version}; this program reads version {SPEC_VERSION}")
            spec = cls(**content)
            spec._check_types()
            if spec.kind not in ("pixels", "latents"):
                raise ValueError(f"has kind {spec.kind!r}, which is neither 'pixels' nor 'latents'")
            if spec.kind == "latents" and spec.autoencoder is None:
                raise ValueError("has latents, but not the autoencoder that they are of")
            if not len(spec.classes) == len(spec.class_counts) == spec.num_classes:
                raise ValueError(f"names {len(spec.classes)} classes, not the {spec.num_classes} of num_classes")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{where} {error if 'is of' in str(error) else f'is not a shard spec: {error}'}") from None
        return spec

    def _check_types(self) -> None:
        counts = {name: getattr(self, name) for name in ("channels", "num_classes", "samples", "skipped")}
        counts |= {f"class_counts[{i}]": count for i, count in enumerate(self.class_counts)}
        if self.image_size is not None:
            counts["image_size"] = self.image_size
        for name, count in counts.items():
            if type(count) is not int or count < 0:
                raise ValueError(f"{name} is {count!r}, not a whole number")
        if not all(isinstance(name, str) for name in self.classes):
            raise ValueError("a class's name is no text")
        if self.kind == "pixels" and self.channels not in (1, 3):
            raise ValueError(f"pictures have {self.channels} channels, not 1 or 3")
        if not isinstance(self.source, dict):
            raise ValueError(f"source is {self.source!r}")
        if self.autoencoder is not None:
            for name, types in AUTOENCODER.items():
                if type(value := self.autoencoder.get(name)) not in types:
                    raise ValueError(f"the autoencoder's {name} is {value!r}")
