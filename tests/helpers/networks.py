"""A small network, a batch for it, and its autoencoder's spec."""

import torch

from sit_composer.autoencoder import AutoencoderSpec
from sit_composer.randomness import sample_key
from sit_composer.sit import SiT

NEWER = {"qk_norm": True, "rms_norm": True, "swiglu": True, "rotary": True, "class_tokens": 3, "class_tokens_start": 1,
         "shared_adaln": True}  # fmt: skip
SPEC = AutoencoderSpec(name="some/vae", channels=4, downsample=8, scale=0.5, shift=0.1)


def small_network(**arguments) -> SiT:
    torch.manual_seed(0)
    sizes = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    network = SiT(**sizes | arguments)
    for p in network.parameters():  # a new network's output is zero, which would hide mistakes
        p.data.add_(0.05 * torch.randn_like(p))
    return network


def batch(count: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    moments = torch.randn(count, 8, 8, 8, generator=generator)
    moments[:, 4:] = moments[:, 4:].abs() * 0.1
    index = torch.arange(100, 100 + count)
    keys = torch.tensor([sample_key(0, 0, i) for i in index.tolist()])
    return {"moments": moments.half(), "label": torch.arange(count) % 10, "index": index, "key": keys}
