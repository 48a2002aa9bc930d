"""A teacher for REPA's rows of the leaderboard: a small vision transformer that learns to read Fashion-MNIST's labels.

Published teachers, such as DINOv2, saw no labels, and hundreds of millions of other images. They can't be had without a
network. This one's features say how REPA's loss works, and not what it gains with a published teacher.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

SIZES = {"img_size": 28, "patch_size": 7, "embed_dim": 128, "depth": 4, "num_heads": 4, "num_classes": 10}
GREY = 0.5  # mean and deviation of the images that it takes, in [0, 1]


def train_teacher(pictures: np.ndarray, labels: np.ndarray, folder: Path, epochs: int = 4) -> None:
    """Saves a vision transformer as timm's `save_for_hf` does; images are uint8 (N, 28, 28), labels (N,)."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", **SIZES)
    x, y = torch.from_numpy(pictures.copy())[:, None], torch.from_numpy(labels.astype(np.int64))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.05)
    batches = -(-len(x) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=epochs * batches)
    for epoch in range(epochs):
        right = 0
        for indices in torch.randperm(len(x)).split(128):
            images = (x[indices].expand(-1, 3, -1, -1) / 255 - GREY) / GREY
            flipped = torch.rand(len(indices), 1, 1, 1) < 0.5
            logits = network(torch.where(flipped, images.flip(-1), images))
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, y[indices]).backward()
            optimizer.step()
            schedule.step()
            right += int((logits.argmax(1) == y[indices]).sum())
        print(f"teacher, epoch {epoch + 1}/{epochs}: read {right / len(x):.1%} of the images right", flush=True)
    network.pretrained_cfg["mean"] = network.pretrained_cfg["std"] = (GREY,) * 3
    save_for_hf(network, folder, model_args=SIZES, safe_serialization=True)
