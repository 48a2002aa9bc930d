"""The mean and standard deviation of latents per channel: over the data, or from a file.

Sums are float64 (3, C): the number of values of a channel, their sum, and that of their squares. Each image's are added
in the order of a part, and the parts' in the order of the source, so that the result is the same to the bit for any
number of workers and after any interruption.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convert.sources.parts import InputError
from sit_composer.autoencoder import AutoencoderSpec

# What files call mean and deviation: LightningDiT's latents_stats.pt and our spec.json; diffusers' config.json;
# REPA-E's *-latents-stats.pt, which has 1 / deviation.
NAMES = (("mean", "std"), ("latents_mean", "latents_std"), ("latents_bias", "latents_scale"))
CONSTANT = 1e-4  # a deviation that small against the root mean square is below float16's rounding


def sums_of(moments: np.ndarray, channels: int) -> np.ndarray:
    """The sums of an image's moments, (2C, H, W), or (C, H, W) without deviation. A value is mean + std · noise, whose
    expected square is mean² + std²."""
    values = moments.reshape(len(moments), -1).astype(np.float64)
    mean, std = values[:channels], values[channels:]
    squares = np.square(mean).sum(1) + (np.square(std).sum(1) if len(std) else 0.0)
    return np.stack([np.full(channels, mean.shape[1], np.float64), mean.sum(1), squares])


def statistics_of(sums: Any) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the standard deviation of each channel."""
    count, total, squares = np.array(sums, np.float64)
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - np.square(mean), 0.0))


def standardized(of: AutoencoderSpec, mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the deviation of each channel after `AutoencoderSpec.standardize`."""
    if of.mean is None:
        return (mean - of.shift) * of.scale, std * abs(of.scale)
    return (mean - np.array(of.mean)) / np.array(of.std) * of.scale, std / np.array(of.std) * abs(of.scale)


def doubt(of: AutoencoderSpec, sums: Any) -> str | None:
    """What is wrong with the first channel that is implausible after standardization; None if all are plausible."""
    for channel, (mean, std) in enumerate(zip(*standardized(of, *statistics_of(sums)), strict=True)):
        if fault := of.doubt(mean, std, f"latents of channel {channel}"):
            return fault
    return None


def overall(of: AutoencoderSpec, sums: Any) -> tuple[float, float]:
    """The mean and the deviation of all channels' values together, standardized."""
    means, stds = standardized(of, *statistics_of(sums))
    mean = means.mean()
    return float(mean), float(np.sqrt((np.square(means) + np.square(stds)).mean() - np.square(mean)))


def measured(of: AutoencoderSpec, sums: Any) -> dict[str, Any]:
    """The fields of a spec that is standardized by the data's own statistics. Raises InputError if that can't be."""
    mean, std = statistics_of(sums)
    constant = np.flatnonzero(std <= CONSTANT * np.sqrt(np.square(mean) + np.square(std)))
    if len(constant):
        raise InputError(f"--statistics: channel {constant[0]} of the latents is constant, expected a deviation over 0")
    return fields(mean.tolist(), std.tolist(), "data")


def fields(mean: list[float], std: list[float], source: str) -> dict[str, Any]:
    return {"scale": 1.0, "shift": 0.0, "mean": tuple(mean), "std": tuple(std), "statistics": source}


def read_statistics(path: str, channels: int) -> tuple[list[float], list[float]]:
    """The means and deviations in a JSON file, or in a file of torch, which is read without running code in it. Raises
    InputError unless there is one of each per channel."""
    try:
        if Path(path).suffix == ".json":
            content = json.loads(Path(path).read_text("utf-8"))
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        content = content.get("autoencoder") or content  # of a spec.json
        names = next(names for names in NAMES if all(content.get(name) is not None for name in names))
        mean, std = (torch.as_tensor(content[name], dtype=torch.float64).flatten() for name in names)
    except StopIteration:
        raise InputError(f"--statistics: {path}: got no mean and std, expected numbers per channel") from None
    except Exception as error:  # torch.load raises a dozen kinds
        expected = "expected JSON (.json), or a file of torch.save with tensors"
        raise InputError(f"--statistics: {path}: can't be read ({type(error).__name__}); {expected}") from None
    std = 1 / std if names[1] == "latents_scale" else std
    if not len(mean) == len(std) == channels:
        expected = f"expected {channels}, one per channel of the autoencoder's latents"
        raise InputError(f"--statistics: {path}: got {len(mean)} means and {len(std)} deviations, {expected}")
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise InputError(f"--statistics: {path}: got NaN, infinite or no deviation, expected numbers over 0")
    return mean.tolist(), std.tolist()
