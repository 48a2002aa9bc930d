"""What pictures look like to a network: the features that evaluation compares."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from sit_composer.errors import UserError


@dataclass
class Extractor:
    """A network from uint8 pictures (N, 3, H, W) to a dict of features, and spatial and logits if it has them."""

    name: str  # inception, or the file's name
    identity: str  # inception, or the file's sha256
    network: Callable[[Any], Any]
    device: str

    def __call__(self, pictures: Any) -> dict[str, Any]:
        """Float32 arrays (N, D) on the CPU.

        Raises:
            UserError: if it fails, or returns something else.
        """
        try:
            with torch.inference_mode():
                out = self.network(pictures.to(self.device))
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [""]
            advice = "; take a smaller --batch-size" if isinstance(error, torch.OutOfMemoryError) else ""
            shape = tuple(pictures.shape)
            raise UserError(f"{self.name}: failed on pictures {shape}: {lines[-1].strip()}{advice}") from error
        if isinstance(out, torch.Tensor):
            out = {"features": out}
        elif isinstance(out, tuple) and len(out) == 2:
            out = {"features": out[0], "logits": out[1]}
        if not isinstance(out, dict) or not isinstance(out.get("features"), torch.Tensor):
            raise UserError(f"{self.name}: returned neither features, (features, logits) nor a dict with 'features'")
        out = {name: out[name] for name in ("features", "spatial", "logits") if out.get(name) is not None}
        if "spatial" in out:
            out["spatial"] = out["spatial"].flatten(1)
        for name, value in out.items():
            if value.ndim != 2 or len(value) != len(pictures):
                raise UserError(
                    f"{self.name}: {name} are {tuple(value.shape)} for {len(pictures)} pictures, not (N, D)"
                )
        return {name: value.float().cpu().numpy() for name, value in out.items()}


def load_extractor(features: str) -> Extractor:
    """The extractor called ``inception``, or that of a TorchScript file.

    Raises:
        UserError: if there is none, or its weights can't be fetched.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if features == "inception":
        return Extractor("inception", "inception", load_inception(device), device)
    if not os.path.isfile(features):
        raise UserError(f"--features: {features} is no file; it takes inception, or a TorchScript file")
    try:
        network = torch.jit.load(features, map_location=device).eval()
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--features: {features} is not a TorchScript module (torch.jit.save): {reason}") from None
    with open(features, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Extractor(Path(features).name, f"sha256:{digest}", network, device)


def load_inception(device: str) -> Callable[[Any], dict[str, Any]]:
    """FID's InceptionV3 with all three outputs."""
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], verbose=True)
    except Exception as error:
        cache = Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name)
        raise UserError(
            f"--features inception: its weights come over the network once, and can't be had ({error}); "
            f"put {URL_INCEPTION_V3} at {cache}, or give --features FILE"
        ) from None
    network.to(device)
    seen = {}
    # sFID (Nash et al. 2021, arXiv 2103.03841) as ADM has it: the first 7 channels of TensorFlow's mixed_6, which is
    # Mixed_6d here, in its order (H, W, C), in which mu_s and sigma_s of ADM's reference batches are.
    network.Mixed_6d.register_forward_hook(
        lambda module, args, out: seen.update(spatial=out[:, :7].permute(0, 2, 3, 1))
    )

    def forward(pictures: Any) -> dict[str, Any]:
        features, logits = network(pictures)
        return {"features": features, "logits": logits, "spatial": seen.pop("spatial")}

    return forward
