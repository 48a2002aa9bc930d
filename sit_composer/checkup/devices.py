"""Checks that need torch: GPU and driver, bfloat16, flash attention and memory."""

import os
import shutil
import subprocess
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sit_composer.attention import attend
from sit_composer.checkup.finding import Finding, Make, failed, not_checked, ok, warning
from sit_composer.config.ranks import microbatch
from sit_composer.config.schema import Config, network_arguments
from sit_composer.costs.estimate import GIB, encoder_memory, memory
from sit_composer.costs.room import check_room, ram, room
from sit_composer.data.spec import DataSpec
from sit_composer.errors import first_line
from sit_composer.precision import autocast, has_bfloat16, resolve

DRIVER = Path("/proc/driver/nvidia/version")
GPU = "nvidia-smi must list the GPU; in a container: --gpus all, and a driver on the host"
FLASH = "torch takes a slower kernel here; a GPU since Ampere has it, with bf16 or amp_fp16"
XL = (16, 72, 256)  # heads, their width and tokens of SiT-XL/2


def check_devices(make: Make, config: Config | None, specs: dict[str, DataSpec]) -> None:
    """Makes the checks of this rank's device, and of memory."""
    make("GPU", 60, gpu, GPU)
    precision = config.precision if config is not None else "auto"
    make("bfloat16", 60, lambda: bfloat16(precision), GPU)
    make("flash attention", 60, lambda: flash_attention(*attention_sizes(config)), GPU)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        make("RAM", 10, memory_here, "end other programs, or take a larger machine")
        if config is not None:
            make("memory of the run", 60, lambda: run_memory(config, specs), "python -m sit_composer.memory says more")


def device() -> str:
    """cuda or cpu. Makes this rank's GPU the thread's: each check has a thread of its own."""
    if not torch.cuda.is_available():
        return "cpu"
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return "cuda"


def gpu() -> Finding:
    """This rank's GPU, the driver, and what other programs have taken."""
    if not torch.cuda.is_available():
        if DRIVER.exists() or shutil.which("nvidia-smi"):
            torch.cuda.init()  # raises why it can't be used
        return not_checked(f"torch {torch.__version__} finds no GPU; what follows is checked on the CPU")
    count, rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if rank >= count:
        return failed(f"{count} GPUs for rank {rank} of this node, expected one per rank", "lower -n")
    device()
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30) if shutil.which(command[0]) else None
    driver = done.stdout.split()[0] if done is not None and done.stdout.split() else "of unknown version"
    free, total = torch.cuda.mem_get_info()
    text = (
        f"{torch.cuda.get_device_name()}, {free / GIB:.3g} of {total / GIB:.3g} GiB free; {count} on this node; driver"
    )
    text += f" {driver}; torch {torch.__version__} for CUDA {torch.version.cuda}"
    if free < 0.9 * total:
        return warning(text, "another program uses it: nvidia-smi names it")
    return ok(text)


def bfloat16(precision: str) -> Finding:
    """Multiplies matrices in bfloat16, and resolves a run's precision."""
    here = device()
    resolved = resolve(precision, here)
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0)).to(here)
    with autocast("bf16", here):
        product = a @ b
    fault = far(product, a.double() @ b.double(), 0.01)
    if product.dtype != torch.bfloat16 or fault:
        return failed(
            f"a product of matrices is wrong: {fault or product.dtype}", "the device or its driver is at fault"
        )
    kind = "in hardware" if has_bfloat16(here) else "slowly, as there is no hardware for it"
    return ok(f"computed {kind}; precision={precision}{f' is {resolved} here' if resolved != precision else ''}")


def flash_attention(heads: int, width: int, tokens: int) -> Finding:
    """Calls the kernel forward and backward, and compares it with attention by matrix products."""
    here = device()
    dtype = torch.bfloat16 if here == "cuda" else torch.float32
    drawn = torch.randn(3, 2, heads, tokens, width, generator=torch.Generator().manual_seed(0)).to(here, dtype)
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            found = with_gradients(drawn)
    except RuntimeError as error:  # torch's, also for a GPU without the kernel
        return warning(f"does not run: {first_line(error)}", FLASH)
    with sdpa_kernel(SDPBackend.MATH):
        expected = with_gradients(drawn.float())
    if fault := far(found, expected, 0.02):
        return failed(f"is wrong: {fault}", "the device or its driver is at fault")
    return ok(f"ran in {str(dtype).removeprefix('torch.')} with {heads} heads of {width} and {tokens} tokens")


def with_gradients(qkv: Tensor) -> Tensor:
    """Attention of (3, N, heads, T, d), and the gradient of its sum of squares, as one float32 vector."""
    qkv = qkv.detach().requires_grad_()
    out = attend(*qkv)
    out.float().square().sum().backward()
    return torch.cat([out.flatten().float(), qkv.grad.flatten().float()]).detach()


def far(found: Tensor, expected: Tensor, most: float) -> str | None:
    """The relative error, if it is over ``most`` or no number."""
    error = ((found.double() - expected).norm() / expected.norm()).item()
    return None if error <= most else f"relative error {error:.2g}, expected at most {most:g}"


def attention_sizes(config: Config | None) -> tuple[int, int, int]:
    """Heads, their width, and the tokens of an image."""
    if config is None:
        return XL
    network = network_arguments(config.model)
    heads, tokens = network["num_heads"], (network["input_size"] // network["patch_size"]) ** 2
    return heads, network["hidden_size"] // heads, tokens


def memory_here() -> Finding:
    """Memory that is free."""
    free, total = min(psutil.virtual_memory().available, ram()), ram()
    text = f"{free / GIB:.3g} of {total / GIB:.3g} GiB available"
    return ok(text) if free > 0.1 * total else warning(text, "end other programs, or take a larger machine")


def run_memory(config: Config, specs: dict[str, DataSpec]) -> Finding:
    """What training takes by `sit_composer.memory`, on this rank's device."""
    cuda = device() == "cuda"
    if config.precision.startswith("amp") and not cuda:
        return not_checked("the run is one for GPUs")
    encodes = config.autoencoder.name is not None and "data" in specs and specs["data"].kind == "pixels"
    world, size = int(os.environ.get("WORLD_SIZE", 1)), microbatch(config)
    text = check_room(config, encodes, world, size)  # raises if that is too much for a CPU
    if not isinstance(size, int):
        return ok(text)
    needs = memory(config, world, size, cuda, encoder_memory(config) if encodes else (0, 0)).total
    here = room() if cuda else psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if needs > here:
        return warning(f"{text}; available: {here / GIB:.3g}", "lower trainer.device_train_microbatch_size")
    return ok(text)
