"""What NVIDIA's GPUs can do at most, and which one is here."""

import re

import torch

# Name: (what `torch.cuda.get_device_name` says behind "NVIDIA ", dense bf16 and fp16 TFLOP/s with sums in fp32, fp32
# TFLOP/s without tensor cores). Data sheets that give only the rate "with sparsity" are halved.
PEAKS = {
    "A10": ("A10", 125, 31.2),  # A10 data sheet
    "A30": ("A30", 165, 10.3),  # A30 data sheet
    "A40": ("A40", 149.7, 37.4),  # A40 data sheet
    "A100": (r"A100-(SXM\d?|PCI[Ee])-[48]0GB|A100 80GB PCI[Ee]", 312, 19.5),  # A100 data sheet: one rate for all
    "H100 SXM": ("H100 80GB HBM3", 989, 67),  # H100 data sheet: SXM5
    "H100 PCIe": ("H100 PCIe", 756, 51),  # H100 data sheet of 2023: PCIe
    "H100 NVL": ("H100 NVL", 835, 60),  # H100 data sheet: NVL
    "GH200": (r"GH200 \d+GB?( HBM3e)?", 989, 67),  # GH200 data sheet
    "H200": ("H200", 989, 67),  # H200 data sheet: SXM
    "H200 NVL": ("H200 NVL", 835, 60),  # H200 data sheet: NVL
    "B200": ("B200", 2250, 75),  # HGX B200 data sheet: an eighth of the board's
    "GB200": ("GB200", 2500, 80),  # GB200 NVL72 data sheet: half of a superchip's
    "L4": ("L4", 121, 30.3),  # L4 data sheet
    "L40": ("L40", 181, 90.5),  # L40 data sheet
    "L40S": ("L40S", 362, 91.6),  # L40S data sheet
    "RTX 3090": ("GeForce RTX 3090", 71, 35.6),  # GA102 whitepaper, appendix A
    "RTX 4090": ("GeForce RTX 4090", 165.2, 82.6),  # Ada whitepaper, appendix A
    "RTX 5090": ("GeForce RTX 5090", 209.5, 104.8),  # RTX Blackwell whitepaper, appendix A
    "RTX A6000": ("RTX A6000", 154.8, 38.7),  # GA102 whitepaper, appendix B
    "RTX 6000 Ada": ("RTX 6000 Ada Generation", 364.2, 91.1),  # Ada whitepaper, appendix C
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
