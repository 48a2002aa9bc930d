"""What NVIDIA's GPUs can do at most, and which one is here."""

import re

import torch

# Name: (what `torch.cuda.get_device_name` says behind "NVIDIA ", dense bf16 and fp16 TFLOP/s with sums in fp32, fp32
# TFLOP/s without tensor cores). Data sheets that give only the rate "with sparsity" are halved. Those of data centers'
# GPUs stand on www.nvidia.com/en-us/data-center/NAME (a10, …), or where a line says; the whitepapers are
# GA102: www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf
# Ada: images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
# Blackwell: images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf
PEAKS = {
    "A10": ("A10", 125, 31.2),  # data sheet
    "A30": ("A30", 165, 10.3),  # data sheet
    "A40": ("A40", 149.7, 37.4),  # data sheet
    "A100": (r"A100-(SXM\d?|PCI[Ee])-[48]0GB|A100 80GB PCI[Ee]", 312, 19.5),  # data sheet: one rate for all
    "H100 SXM": ("H100 80GB HBM3", 989, 67),  # data sheet: 1,979 with sparsity
    "H100 PCIe": ("H100 PCIe", 756, 51),  # data sheet of 2023: 1,513 with sparsity
    "H100 NVL": ("H100 NVL", 835, 60),  # data sheet: 1,671 with sparsity
    "GH200": (r"GH200 \d+GB?( HBM3e)?", 989, 67),  # nvdam.widen.net/s/rrgqqnpbz8: 1,979 with sparsity, 990 without
    "H200": ("H200", 989, 67),  # data sheet: 1,979 with sparsity
    "H200 NVL": ("H200 NVL", 835, 60),  # data sheet: 1,671 with sparsity
    "B200": ("B200", 2250, 75),  # nvdam.widen.net/s/wwnsxrhm2w, HGX B200: 4,500 with sparsity, a GPU
    "GB200": ("GB200", 2500, 80),  # the same, GB200 NVL72: 5,000 with sparsity, a GPU
    "L4": ("L4", 121, 30.3),  # data sheet: 242 with sparsity
    "L40": ("L40", 181, 90.5),  # data sheet
    "L40S": ("L40S", 362, 91.6),  # data sheet
    "RTX 3090": ("GeForce RTX 3090", 71, 35.6),  # GA102, appendix A: 71
    "RTX 4090": ("GeForce RTX 4090", 165.2, 82.6),  # Ada, appendix A: 165.2
    "RTX 5090": ("GeForce RTX 5090", 209.5, 104.8),  # Blackwell, appendix A: 209.5
    "RTX A6000": ("RTX A6000", 154.8, 38.7),  # GA102, table 3: 154.8
    "RTX 6000 Ada": ("RTX 6000 Ada Generation", 364.2, 91.1),  # its data sheet: 1,457 in fp8 with sparsity
}
# Those of the tables: (GiB that torch sees, and the two rates).
GPUS = {
    "A100 40GB": (39.4, *PEAKS["A100"][1:]),
    "A100 80GB": (79.1, *PEAKS["A100"][1:]),
    "H100 80GB": (79.1, *PEAKS["H100 SXM"][1:]),
    "H200 141GB": (139.7, *PEAKS["H200"][1:]),
    "B200 180GB": (178.3, *PEAKS["B200"][1:]),
}


def which(device_name: str) -> str | None:
    """The GPU of `PEAKS` that torch calls so; None if it is another one, or a part of one (MIG)."""
    short = device_name.removeprefix("NVIDIA ").strip()
    return next((name for name, (pattern, *_) in PEAKS.items() if re.fullmatch(pattern, short)), None)


def peak_flops(precision: str) -> float | None:
    """This GPU's peak FLOP/s in a precision, if it is known."""
    found = which(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if found is None:
        return None
    _, low, full = PEAKS[found]
    if precision == "fp32":  # as TF32, which runs at half of bfloat16's rate on all of these, where it is allowed
        return (low / 2 if torch.backends.cuda.matmul.allow_tf32 else full) * 1e12
    return low * 1e12
