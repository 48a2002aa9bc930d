"""What ranks send each other: whether it is right, how fast it is, and whether they have the same versions."""

import os
import socket
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, distributed

from sit_composer.checkup.devices import device
from sit_composer.checkup.finding import Finding, failed, not_checked, ok, warning

SECONDS = 120.0  # for all ranks to meet and to measure
CONNECT = (
    "node 0's MASTER_ADDR and MASTER_PORT must be reachable; NCCL_DEBUG=INFO says what fails, and NCCL_SOCKET_IFNAME "
    "(GLOO_SOCKET_IFNAME on CPUs) names the network"
)
SLOW = 1e9  # bytes a second between GPUs, below which the network is none for training: 10 Gbit Ethernet's


def check_ranks(failures: list[str], others: list[tuple[str, Finding]]) -> Finding:
    """Sums numbers over all ranks, measures that, and compares their versions.

    Appends what failed elsewhere to ``others``; ``failures`` are this rank's, as its own console may not be seen.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world == 1:
        return not_checked("there is one rank; run composer -n N -m sit_composer.doctor")
    here, backend = device(), "nccl" if device() == "cuda" else "gloo"
    # Never destroyed: Gloo's destructor can wait forever for a thread that waits for Python's lock. The command exits.
    distributed.init_process_group(backend, timeout=timedelta(seconds=SECONDS))
    total = torch.full((1,), rank + 1.0, device=here)
    distributed.all_reduce(total)
    if total.item() != world * (world + 1) / 2:
        return failed(f"{backend} summed {total.item():g}, expected {world * (world + 1) / 2:g}", CONNECT)
    latency = measure(total, 20)
    values = torch.ones((64 if here == "cuda" else 4) * 2**20, device=here)
    speed = 2 * (world - 1) / world * values.nbytes / measure(values, 5)  # "bus bandwidth" of NVIDIA's nccl-tests
    versions: dict[str, Any] = {name: version(name) for name in ("sit-composer", "mosaicml", "torch")}
    if here == "cuda":
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    everywhere: list[Any] = [None] * world
    distributed.all_gather_object(everywhere, (socket.gethostname(), versions, failures))
    for other, (host, _, texts) in enumerate(everywhere):
        if other != rank:
            others.extend((f"rank {other}, {host}", failed(text)) for text in texts)
    hosts = ", ".join(sorted({host for host, *_ in everywhere}))
    text = f"{backend} between {world} ranks on {hosts}:"
    text += f" {latency * 1e6:.0f} µs for a number, {speed / 1e9:.3g} GB/s for {values.nbytes / 1e6:.0f} MB"
    odd = next((i for i, (_, theirs, _) in enumerate(everywhere) if theirs != everywhere[0][1]), None)
    if odd is not None:
        return failed(
            f"rank 0 has {everywhere[0][1]}, rank {odd} {everywhere[odd][1]}", "install the same on all nodes"
        )
    if here == "cuda" and speed < SLOW:
        return warning(text, "NCCL_DEBUG=INFO says which network it takes; NCCL_SOCKET_IFNAME names another")
    return ok(text)


def measure(values: Tensor, times: int) -> float:
    """The median of the seconds that an all-reduce takes."""
    took = []
    wait: Callable[[], None] = torch.cuda.synchronize if values.is_cuda else lambda: None
    for _ in range(times + 1):
        wait()
        started = time.perf_counter()
        distributed.all_reduce(values)
        wait()
        took.append(time.perf_counter() - started)
    return statistics.median(took[1:])  # the first one makes the connections
