"""The groups of `on_a_gpu.py`, in order, and the titles and columns of their tables; without torch."""

STEP = {
    "microbatch": "batch", "images_per_second": "images/s", "ms": "ms", "ms_min": "least", "ms_max": "most",
    "mfu": "MFU", "peak_gib": "peak, GiB", "memory_ratio": "predicted / measured", "compile_seconds": "compilation, s",
}  # fmt: skip
# Module: (title, {key of a row: its column}).
TABLES = {
    "step_b": ("Training step, SiT-B/2, latents of 256×256, bfloat16", STEP),
    "step_xl": ("Training step, SiT-XL/2, latents of 256×256, bfloat16", STEP),
    "kernels": ("Noise and loss", {"ms": "ms", "ms_min": "least", "ms_max": "most", "gb_per_second": "GB/s"}),
    "loading": (
        "Latents from disk",
        {"had": "samples/s", "needed_b": "B/2 needs", "needed_xl": "XL/2 needs", "ratio": "had / needed"},
    ),
    "sampling": (
        "Sampling, SiT-XL/2, guided, 50 evaluations",
        {"batch": "batch", "images_per_second": "images/s", "seconds": "s per batch", "mfu": "MFU"},
    ),
    "encoding": (
        "Encoding images of 256×256 by an autoencoder of Stable Diffusion's sizes",
        {"batch": "batch", "images_per_second": "images/s", "ratio": "of one at a time"},
    ),
}  # fmt: skip
