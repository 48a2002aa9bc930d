"""The doctor's checks of a rank's device and of what ranks send each other, which need torch."""

import os
import shutil
import socket
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.collect_env import get_nvidia_driver_version
from torch.utils.collect_env import run as run_shell

from sit_composer.attention import attend
from sit_composer.config.schema import Config
from sit_composer.doctor import GIB, Finding, Make
from sit_composer.errors import first_line
from sit_composer.precision import autocast, has_bfloat16, resolve
from sit_composer.probes_outside import SPACE, check_run, disk

DRIVER = Path("/proc/driver/nvidia/version")
GPU = "nvidia-smi must list the GPU; in a container: --gpus all, and a driver on the host"
FAULT = "the device or its driver is at fault"
HEADS, WIDTH, TOKENS = 16, 72, 256  # of SiT-XL/2
MEETING = 120.0  # seconds for all ranks to meet and to measure
NETWORK = (
    "node 0's MASTER_ADDR and MASTER_PORT must be reachable; NCCL_DEBUG=INFO says what fails, and NCCL_SOCKET_IFNAME "
    "(GLOO_SOCKET_IFNAME on CPUs) names the network"
)
SLOW = 1e9  # bytes a second between GPUs, below which the network is none for training: 10 Gbit Ethernet's


def check_all(make: Make, findings: dict[str, Finding], config: Config | None) -> None:
    """Makes the checks of this rank's device, of what a node writes to and reaches, and of what ranks send."""
    make("GPU", gpu, GPU)
    make("bfloat16", lambda: bfloat16(config.precision if config is not None else "auto"), GPU)
    make("flash attention", flash_attention, GPU)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        make("disk TMPDIR", lambda: disk(tempfile.gettempdir()), SPACE)
        if config is not None:
            check_run(make, config)
    own = [f"{name}: {'; '.join(texts)}" for name, (status, *texts) in findings.items() if status == "failed"]
    make("ranks", lambda: ranks(own), NETWORK, MEETING + 30)


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
        return "not checked", "torch finds no GPU; what follows is checked on the CPU"
    count, rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if rank >= count:
        return "failed", f"{count} GPUs for rank {rank} of this node, expected one per rank", "lower -n"
    device()
    free, total = torch.cuda.mem_get_info()
    text = f"{torch.cuda.get_device_name()}, {free / GIB:.3g} of {total / GIB:.3g} GiB free; {count} on this node; "
    text += f"driver {get_nvidia_driver_version(run_shell)}; torch for CUDA {torch.version.cuda}"
    return ("ok", text) if free > 0.9 * total else ("warning", text, "another program uses it: nvidia-smi names it")


def bfloat16(precision: str) -> Finding:
    """Multiplies matrices in bfloat16, and resolves a run's precision."""
    here = device()
    resolved = resolve(precision, here)
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0)).to(here)
    with autocast("bf16", here):
        product = a @ b
    if fault := far(product, a.double() @ b.double(), 0.01):
        return "failed", f"a product of matrices is wrong: {fault}", FAULT
    kind = "in hardware" if has_bfloat16(here) else "slowly, as there is no hardware for it"
    return "ok", f"computed {kind}; precision={precision}{f' is {resolved} here' if resolved != precision else ''}"


def flash_attention() -> Finding:
    """Calls the kernel forward and backward, and compares it with attention by matrix products."""
    here = device()
    dtype = torch.bfloat16 if here == "cuda" else torch.float32
    drawn = torch.randn(3, 2, HEADS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).to(here, dtype)
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            found = with_gradients(drawn)
    except RuntimeError as error:  # torch's, also for a GPU without the kernel
        advice = "torch takes a slower kernel here; a GPU since Ampere has it, with bf16 or amp_fp16"
        return "warning", f"does not run: {first_line(error)}", advice
    with sdpa_kernel(SDPBackend.MATH):
        expected = with_gradients(drawn.float())
    if fault := far(found, expected, 0.02):
        return "failed", f"is wrong: {fault}", FAULT
    return "ok", f"ran in {str(dtype).removeprefix('torch.')} with {HEADS} heads of {WIDTH} and {TOKENS} tokens"


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


def ranks(own: list[str]) -> Finding:
    """Sums numbers over all ranks, measures that, and tells what failed elsewhere, whose console may not be seen."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world == 1:
        return "not checked", "there is one rank; run composer -n N -m sit_composer.doctor"
    here = device()
    backend = "nccl" if here == "cuda" else "gloo"
    # Never destroyed: Gloo's destructor can wait forever for a thread that waits for Python's lock. The command exits.
    distributed.init_process_group(backend, timeout=timedelta(seconds=MEETING))
    values, took, wrong = torch.empty((64 if here == "cuda" else 4) * 2**20, device=here), [], ""
    for _ in range(6):  # all of them, whatever one finds: the others are in the same collectives
        values.fill_(rank + 1)
        started = time.perf_counter()
        distributed.all_reduce(values)
        least, most = values.aminmax()
        found, expected = {least.item(), most.item()}, world * (world + 1) / 2  # waits for it
        took.append(time.perf_counter() - started)
        if found != {expected}:
            wrong = f"{backend} summed {found}, expected {expected:g}"
    everywhere: list[tuple[str, list[str]]] = [("", [])] * world
    distributed.all_gather_object(everywhere, (socket.gethostname(), [*own, wrong] if wrong else own))
    if wrong:
        return "failed", wrong, NETWORK
    told = [f"rank {i}, {host}: {text}" for i, (host, texts) in enumerate(everywhere) if i != rank for text in texts]
    if told:
        return "failed", *told
    speed = 2 * (world - 1) / world * values.nbytes / statistics.median(took[1:])  # nccl-tests' "bus bandwidth"
    text = f"{backend} between {world} ranks on {', '.join(sorted({host for host, _ in everywhere}))}: "
    text += f"{speed / 1e9:.3g} GB/s for {values.nbytes / 1e6:.0f} MB"
    if here == "cuda" and speed < SLOW:
        return "warning", text, "NCCL_DEBUG=INFO says which network it takes; NCCL_SOCKET_IFNAME names another"
    return "ok", text
