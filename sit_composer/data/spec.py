"""The contents of a folder of shards: `spec.json`, beside `index.json`.

`convert/to_mds.py` writes it last; training and evaluation read it. Only the standard library is imported here.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

from sit_composer.autoencoder_config import stored_channels
from sit_composer.errors import NewerVersion, check_version

SPEC_NAME = "spec.json"
INDEX_NAME = "index.json"  # streaming's list of the shards
SPEC_VERSION = 1
AUTOENCODER: dict[str, list[type]] = {
    "name": [str], "channels": [int], "downsample": [int], "scale": [int, float], "shift": [int, float],
}  # fmt: skip
ADDED = ("mean", "std", "deterministic", "statistics")  # which not every autoencoder has
FEATURES: dict[str, type] = {"teacher": str, "digest": str, "image_size": int, "grid": int, "width": int}
OPTIONAL = ("left_out", "small", "features")  # left out if there are none


@dataclass(frozen=True)
class DataSpec:
    """The contents of a folder of MDS shards.

    Samples of kind ``pixels`` have the columns ``image`` (the original file's bytes, or a cropped PNG or JPEG) and
    ``label`` (int); samples of kind ``latents`` have ``moments`` and ``moments_flip`` (float16, (2·channels, H, W):
    mean, then standard deviation, of the image and of its mirror image, before they are standardized; (channels, H, W)
    of a deterministic autoencoder) and ``label``; and, with a teacher, ``features`` and ``features_flip`` (float16,
    (grid², width)).
    """

    kind: str  # "pixels" or "latents"
    channels: int  # of an image (1 grey, 3 RGB), or of a latent
    image_size: int | None  # side in pixels of every image; None if they differ (training then crops them)
    num_classes: int  # labels are 0 .. num_classes - 1
    classes: list[str]  # a name for each label
    class_counts: list[int]  # samples of each label
    samples: int  # in all shards together
    skipped: int = 0  # images that could not be decoded or encoded, and were left out on request
    source: dict[str, Any] = field(default_factory=dict)  # format, path and columns that the samples came from
    autoencoder: dict[str, Any] | None = None  # an `AutoencoderSpec` for latents; else None
    left_out: dict[str, int] = field(default_factory=dict)  # files and images, by reason, with the skipped ones
    small: dict[str, int] = field(default_factory=dict)  # images of 1x1 pixels, or enlarged very much, by reason
    features: dict[str, Any] | None = None  # beside latents: `Teacher.as_dict` of the teacher whose features they are

    @property
    def stored(self) -> int:
        """The channels of latents' moments."""
        return stored_channels(self.channels, (self.autoencoder or {}).get("deterministic", False))

    def to_json(self) -> str:
        """The text of `spec.json`."""
        content = dataclasses.asdict(self)
        content = {name: value for name, value in content.items() if value or name not in OPTIONAL}
        return json.dumps({"version": SPEC_VERSION, **content}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "DataSpec":
        """Parses the text of `spec.json`. A ValueError, which calls it ``where``, tells what is invalid."""
        try:
            content = {**json.loads(text)}
            check_version(content.pop("version", None), SPEC_VERSION, where)
            spec = cls(**content)
            spec._check_types()
            if spec.kind not in ("pixels", "latents"):
                raise ValueError(f"kind: got {spec.kind!r}, expected 'pixels' or 'latents'")
            if spec.kind == "latents" and spec.autoencoder is None:
                raise ValueError("autoencoder: missing, expected that of the latents")
            names, classes = len(spec.classes), spec.num_classes
            if not names == len(spec.class_counts) == classes:
                raise ValueError(f"classes: got {names} names, expected the {classes} of num_classes")
        except NewerVersion:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{where} is not a shard spec: {str(error).split('__init__() ')[-1]}") from None
        return spec

    def _check_types(self) -> None:
        counts = {name: getattr(self, name) for name in ("channels", "num_classes", "samples", "skipped")}
        counts |= {f"class_counts[{i}]": count for i, count in enumerate(self.class_counts)}
        for name in ("left_out", "small"):
            counts |= {f"{name}.{reason}": count for reason, count in getattr(self, name).items()}
        if self.image_size is not None:
            counts["image_size"] = self.image_size
        for name, count in counts.items():
            if type(count) is not int or count < 0:
                raise ValueError(f"{name}: got {count!r}, expected a whole number")
        if not all(isinstance(name, str) for name in self.classes):
            raise ValueError("classes: expected names as text")
        if self.kind == "pixels" and self.channels not in (1, 3):
            raise ValueError(f"channels: got {self.channels}, expected 1 or 3 for pixels")
        if not isinstance(self.source, dict):
            raise ValueError(f"source: got {self.source!r}, expected an object")
        if unknown := (self.autoencoder or {}).keys() - {*AUTOENCODER, *ADDED}:
            expected = f"one of {', '.join((*AUTOENCODER, *ADDED))}"
            raise ValueError(f"autoencoder.{min(unknown)}: unknown, expected {expected}")
        for name, types in AUTOENCODER.items() if self.autoencoder is not None else ():
            value, expected = self.autoencoder.get(name), " or ".join(kind.__name__ for kind in types)
            if type(value) not in types:
                raise ValueError(f"autoencoder.{name}: got {value!r}, expected {expected}")
        if self.autoencoder is not None:
            self._check_statistics(self.autoencoder)
        if self.features is not None:
            self._check_features(self.features)

    def _check_features(self, features: dict[str, Any]) -> None:
        if self.kind != "latents":
            raise ValueError(f"features: got those of a teacher beside {self.kind}, expected latents")
        for name in {**features, **FEATURES}:
            kind, value = FEATURES.get(name), features.get(name)
            if type(value) is not kind or not value or (isinstance(value, int) and value < 1):
                expected = "nothing" if kind is None else "text" if kind is str else "a whole number of at least 1"
                raise ValueError(f"features.{name}: got {value!r}, expected {expected}")

    def _check_statistics(self, autoencoder: dict[str, Any]) -> None:
        both = [autoencoder[name] for name in ("mean", "std") if autoencoder.get(name) is not None]
        for values in both:
            if not isinstance(values, list) or len(values) != self.channels or len(both) != 2:
                raise ValueError(f"autoencoder.mean and .std: expected {self.channels} numbers each, one per channel")
            if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
                raise ValueError("autoencoder.mean and .std: expected finite numbers")
        if both and min(both[1]) <= 0:
            raise ValueError("autoencoder.std: expected numbers over 0")
        if type(autoencoder.get("deterministic", False)) is not bool:
            raise ValueError("autoencoder.deterministic: expected true or false")
