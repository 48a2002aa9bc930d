"""Guided sampling of SiT-XL/2: 50 evaluations of guided pairs."""

import statistics
from collections.abc import Callable

import torch

from sit_composer import precision
from sit_composer.choices import Sampling
from sit_composer.costs.gpus import peak_flops
from sit_composer.generate import generate
from sit_composer.guidance import Guidance
from sit_composer.sit import SiT, build_sit
from sit_composer.transport import Transport
from tests.benchmarks.gpu.harness import Result, Rows, Setting, seconds_of

POINTS = {"heun": 26, "euler": 51}  # 25 steps of two evaluations, and 50 of one
CASES = [  # precision, whether float32 products may use TF32, batch, limit in seconds
    ("bfloat16", False, 64, 30), ("float32, TF32", True, 32, 30), ("float32", False, 16, 40),
]  # fmt: skip
TINY = {"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 2, "input_size": 8, "num_classes": 10}


def rows(setting: Setting) -> Rows:
    torch.manual_seed(0)
    with torch.device(setting.device):
        network = (SiT(**TINY) if setting.tiny else build_sit("SiT-XL/2")).eval().requires_grad_(False)
    return {
        f"{method}, {kind}": (limit, measure(setting, network, method, kind, tf32, batch))
        for kind, tf32, batch, limit in CASES
        for method in POINTS
    }


def measure(setting: Setting, network: SiT, method: str, kind: str, tf32: bool, batch: int) -> Callable[[], Result]:
    batch = 2 if setting.tiny else batch
    low = "bf16" if kind == "bfloat16" else "fp32"

    def draw(points: int) -> int:
        sampling = Sampling(sampling_method=method, num_steps=points, cfg_scale=1.5)
        guidance = Guidance(network, sampling.cfg_scale)
        with torch.inference_mode(), precision.autocast(low, setting.device):
            _, work = generate(guidance, Transport(), [i % 10 for i in range(batch)], list(range(batch)), sampling)
        return work["passes"]

    def measured() -> Result:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        draw(2)  # warms up
        times = seconds_of(lambda: draw(POINTS[method]), setting.device, 1 if low == "fp32" else 2, warm_up=0)
        seconds = statistics.median(times)
        peak = None if tf32 else peak_flops(low)
        work = 2 * network.forward_macs() * 100 * batch  # FLOPs: 50 guided pairs
        return {
            "batch": batch, "images_per_second": batch / seconds, "seconds": seconds,
            "mfu": work / seconds / peak if peak else None,
        }  # fmt: skip

    return measured
