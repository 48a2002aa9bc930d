"""Small vision transformers of random weights, saved as the real ones are."""

import json
from pathlib import Path

import torch

STATISTICS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}


def write_timm(folder: Path) -> str:
    """A ViT of 8-pixel patches for images of 32 pixels, as a teacher's name."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    save_for_hf(timm.create_model("vit_tiny_patch16_224", **sizes), folder, model_args=sizes, safe_serialization=True)
    return f"timm:{folder}"


def write_transformers(folder: Path, kind: str = "Dinov2") -> str:
    """A ViT of 7-pixel patches for images of 28 pixels, of a class of transformers, as a teacher's name."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    name = kind.removesuffix("Vision")
    config = getattr(transformers, f"{kind}Config")(**sizes, image_size=28, patch_size=7)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**STATISTICS, "of": name}))
    return f"transformers:{folder}"
