"""What the fixtures are made of: tables of pictures, and an autoencoder."""

import io
from pathlib import Path


def write_table(path: Path, first: int, last: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image
    from sklearn.datasets import load_digits

    digits, images = load_digits(), []
    for picture in digits.images[first:last]:
        file = io.BytesIO()
        Image.fromarray((picture * 15).astype("uint8")).save(file, "PNG")
        images.append(file.getvalue())
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": digits.target[first:last]}), path)


def write_vae(folder: Path) -> None:
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, scaling_factor=0.3, shift_factor=0.05,
    ).save_pretrained(folder)  # fmt: skip
