"""The features of images that evaluation compares, and the networks that extract them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

from sit_composer.checkpoint.record import digest
from sit_composer.choices import dinov2_file
from sit_composer.errors import UserError, first_line, one_line

OUTPUTS = ("features", "spatial", "logits", "second")


@dataclass
class Extractor:
    """A network from uint8 images (N, 3, H, W) to a dict of features, and spatial and logits if it has them."""

    name: str  # inception, dinov2, or the file's name
    identity: str  # inception, dinov2-large and a digest of its weights, or the file's sha256
    network: Callable[[Tensor], Tensor | tuple[Tensor, Tensor] | dict[str, Tensor]]
    device: str
    second: "Extractor | None" = None  # whose features are the output second

    def __call__(self, images: Tensor) -> dict[str, np.ndarray]:
        """Float32 arrays (N, D) on the CPU; raises UserError if the network fails, or returns something else."""
        try:
            with torch.inference_mode():
                out = self.network(images.to(self.device))
        except Exception as error:  # TorchScript's is a trace of many lines, of which the last says what is wrong
            reason = str(error).strip().rpartition("\n")[2].strip()
            advice = "; use a smaller --batch-size" if isinstance(error, torch.OutOfMemoryError) else ""
            raise UserError(f"{self.name}: failed on images {tuple(images.shape)}: {reason}{advice}") from error
        if isinstance(out, Tensor):
            out = {"features": out}
        elif isinstance(out, tuple) and len(out) == 2:
            out = {"features": out[0], "logits": out[1]}
        if not isinstance(out, dict) or not isinstance(out.get("features"), Tensor):
            raise UserError(f"{self.name}: expected features, (features, logits) or a dict with 'features' as output")
        out = {name: out[name] for name in OUTPUTS[:3] if out.get(name) is not None}
        if "spatial" in out:
            out["spatial"] = out["spatial"].flatten(1)
        for name, value in out.items():
            if value.ndim != 2 or len(value) != len(images):
                shape = tuple(value.shape)
                raise UserError(f"{self.name}: {name}: got shape {shape} for {len(images)} images, expected (N, D)")
        arrays = {name: value.float().cpu().numpy() for name, value in out.items()}
        return arrays | {"second": self.second(images)["features"]} if self.second else arrays


def load_extractor(features: str) -> Extractor:
    """The extractor of ``inception``, ``dinov2``, ``dinov2:FILE`` or a TorchScript file, or of two, with a comma.

    Raises UserError if it can't be loaded.
    """
    first, _, second = features.partition(",")
    if second:
        return replace(load_extractor(first), second=load_extractor(second))
    # By its number, as a thread that generates images has a current device of its own, the first one.
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    if features == "inception":
        return Extractor("inception", "inception", load_inception(device), device)
    if (file := dinov2_file(features)) is not None:
        from sit_composer.evaluation.dinov2 import load_dinov2  # needs timm, which is optional

        size, weights, dinov2 = load_dinov2(file or None, device)
        name = "dinov2" if size == "large" else f"dinov2-{size}"  # the published distances are of the large one
        return Extractor(name, f"dinov2-{size}:{weights}", dinov2, device)
    try:
        network = torch.jit.load(features, map_location=device).eval()
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"--features: {features} is not a TorchScript module (torch.jit.save): {reason}") from None
    return Extractor(Path(features).name, f"sha256:{digest(features)}", network, device)


def load_inception(device: str) -> Callable[[Tensor], dict[str, Tensor]]:
    """FID's InceptionV3 with all three outputs."""
    try:
        network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], verbose=True)
    except Exception as error:
        cache = Path(torch.hub.get_dir(), "checkpoints", Path(fidelity.URL_INCEPTION_V3).name)
        what = f"its weights come over the network once, and can't be loaded: {one_line(error)}"
        other = "or give --features FILE, which python -m sit_composer.features --out FILE makes without a network"
        advice = f"put {fidelity.URL_INCEPTION_V3} at {cache}, {other}"
        raise UserError(f"--features inception: {what}; {advice}") from None
    network.to(device)
    seen: dict[str, Tensor] = {}
    # sFID (Nash et al. 2021, arXiv 2103.03841) as in ADM: the first 7 channels of TensorFlow's mixed_6, here Mixed_6d,
    # in TensorFlow's order (H, W, C), as in mu_s and sigma_s of ADM's reference batches.
    network.Mixed_6d.register_forward_hook(lambda _, args, out: seen.update(spatial=out[:, :7].permute(0, 2, 3, 1)))

    def forward(images: Tensor) -> dict[str, Tensor]:
        features, logits = network(images)
        return {"features": features, "logits": logits, "spatial": seen.pop("spatial")}

    return forward
