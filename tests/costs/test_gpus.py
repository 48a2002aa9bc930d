"""A GPU is known by the name that its driver gives, and by no part of another's."""

import pytest
import torch

from sit_composer.costs.gpus import GPUS, PEAKS, peak_flops, which

NAMES = {  # as torch.cuda.get_device_name() gives them
    "NVIDIA A100-SXM4-40GB": "A100",
    "A100-SXM4-40GB": "A100",  # drivers before 2021
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA A100-PCIE-40GB": "A100",
    "NVIDIA A100 80GB PCIe": "A100",
    "NVIDIA A100-SXM4-80GB MIG 3g.40gb": None,
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H100 NVL": "H100 NVL",
    "NVIDIA GH200 480GB": "GH200",
    "NVIDIA GH200 120GB": "GH200",
    "NVIDIA GH200 144G HBM3e": "GH200",
    "NVIDIA H200": "H200",
    "NVIDIA H200 NVL": "H200 NVL",
    "NVIDIA B200": "B200",
    "NVIDIA GB200": "GB200",
    "NVIDIA A10": "A10",
    "NVIDIA A10G": None,
    "NVIDIA A30": "A30",
    "NVIDIA A40": "A40",
    "NVIDIA L4": "L4",
    "NVIDIA L40": "L40",
    "NVIDIA L40S": "L40S",
    "NVIDIA GeForce RTX 3090": "RTX 3090",
    "NVIDIA GeForce RTX 3090 Ti": None,
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 5090": "RTX 5090",
    "NVIDIA RTX A6000": "RTX A6000",
    "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada",
    "Tesla V100-SXM2-16GB": None,
    "AMD Instinct MI300X": None,
}


@pytest.mark.parametrize(("name", "gpu"), NAMES.items())
def test_a_gpu_is_known_by_its_whole_name(name, gpu):
    assert which(name) == gpu


def test_every_known_gpu_has_a_name_above():
    assert set(NAMES.values()) == {*PEAKS, None}


@pytest.mark.parametrize(("name", "low", "full"), [("NVIDIA H100 NVL", 835e12, 60e12), ("NVIDIA B200", 2250e12, 75e12)])
def test_the_peak_is_that_of_the_precision(monkeypatch, name, low, full):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    tf32 = torch.backends.cuda.matmul
    before = tf32.allow_tf32
    try:
        for tf32.allow_tf32, fp32 in ((False, full), (True, low / 2)):
            assert (peak_flops("bf16"), peak_flops("amp_bf16"), peak_flops("fp32")) == (low, low, fp32)
    finally:
        tf32.allow_tf32 = before


def test_an_unknown_gpu_has_no_peak(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA A100-SXM4-80GB MIG 3g.40gb")
    assert peak_flops("bf16") is None


def test_the_tables_rates_are_in_order():
    assert all(room > 0 and low > full > 0 for room, low, full in GPUS.values())
