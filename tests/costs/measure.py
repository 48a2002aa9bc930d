"""Measures the bytes of real work on a CPU, and prints them as JSON:   python -m tests.costs.measure FUNCTION ARGUMENTS

`measure` runs it in its own process, where oneDNN uses its AVX2 kernels. On processors with AVX-512 or AMX it would
choose others, which reorder weights and keep workspaces in memory that the estimate doesn't count.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.functional import scaled_dot_product_attention

from sit_composer.autoencoder import DiffusersAutoencoder
from sit_composer.config.checks import check
from sit_composer.config.load import load_config
from sit_composer.costs import estimate
from sit_composer.sit import SiT
from sit_composer.transport import Transport
from tests.helpers.paths import ROOT

KERNELS = {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}  # read when oneDNN starts: only a new process obeys
TINY = (
    "run_name=m", "data.num_workers=0", "data.image_size=32", "model.input_size=32", "model.hidden_size=256",
    "model.depth=6", "ema=null", "trainer.progress_bar=false", "trainer.max_duration=3ba", "trainer.autoresume=false",
    "trainer.save_folder=null", "trainer.save_interval=10ep",
)  # fmt: skip


def measure(function: str, *arguments: Any, launcher: tuple[str, ...] = (sys.executable,), **environment: str) -> list:
    """What a function of this module returns in a process of its own, or in several: a list of each's result."""
    command = [*launcher, "-m", "tests.costs.measure", function, json.dumps(arguments)]
    environment = {**os.environ, **KERNELS, **environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    results = [json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, done.stdout[-2000:] + done.stderr[-3000:]
    return results


def peak(function: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator had given out at once since the call began."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [(e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = top = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        live += size
        top = max(top, live)
    return top


def passes(sizes: dict, samples: int, cases: list) -> list[list[int]]:
    """For each case (precision, checkpointing), the peaks of a step's first microbatch and of a later one."""
    peaks = []
    for precision, checkpointing in cases:
        network, transport = SiT(**sizes).train(), Transport()
        for i, block in enumerate(network.blocks):
            block.attn.attend = scaled_dot_product_attention  # as the estimate has it; see `sit_composer.attention`
            if checkpointing:
                network.blocks[i] = checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
        step = partial(microbatch, network, transport, samples, precision)
        peaks.append([peak(step), peak(step)])
    return peaks


def microbatch(network: SiT, transport: Transport, samples: int, precision: str = "fp32") -> None:
    """Forward and backward."""
    x1, x0 = torch.randn(2, samples, network.in_channels, network.input_size, network.input_size)
    t, labels = torch.rand(samples), torch.zeros(samples, dtype=torch.long)
    with nullcontext() if precision == "fp32" else torch.autocast("cpu", torch.bfloat16):
        xt = transport.path.interpolate(t, x0, x1)[0]
        loss = transport.loss(network(xt, t, labels, torch.rand(samples)).float(), t, x0, x1).mean()
    loss.backward()


def encoder(folder: str, samples: int, side: int) -> list[int]:
    """The bytes of an autoencoder's weights, and the peak of encoding images."""
    vae = DiffusersAutoencoder(folder)
    images = torch.zeros(samples, vae.picture_channels, side, side)
    with torch.no_grad():
        working = peak(lambda: vae.vae.encode(images))
    return [sum(p.numel() for p in vae.vae.parameters()) * 4, working + images.nbytes]


def resident(warm_up: dict, sizes: dict, samples: int) -> int:
    """By how many bytes three steps of two microbatches make this process larger at its peak."""

    def train(sizes: dict) -> None:
        network, transport = SiT(**sizes).train(), Transport()
        trained = [p for p in network.parameters() if p.requires_grad]
        average, optimizer = [p.detach().clone() for p in trained], torch.optim.AdamW(trained)
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(2):
                microbatch(network, transport, samples)
            optimizer.step()
            torch._foreach_lerp_(average, trained, 0.1)

    def most() -> int:  # not getrusage's, which begins at the peak of the process that started this one
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024

    train(warm_up)  # what the libraries set up at first use
    before = most()
    train(sizes)
    return most() - before


def training(data: str, cases: list[list[str]]) -> list[float]:
    """Prediction / measurement of real trainings with these overrides, in microbatches of 4 at most."""
    from sit_composer.training.fit import run as train  # Composer: only here

    ranks = int(os.environ.get("WORLD_SIZE", 1))
    ratios = []
    for overrides in cases:
        config = load_config(str(ROOT / "yamls/quickstart.yaml"), [*TINY, f"data.local={data}", *overrides])
        config.callbacks = {}
        config.trainer["device_train_microbatch_size"] = 4
        check(config)
        times = 1 if config.fsdp is None else 2
        # DDP's first copy of the weights may be freed by Gloo's thread, which the profiler doesn't see. The ranks'
        # weights are alike by their seed.
        with patch("torch.nn.parallel.distributed._sync_module_states"):
            top = min(peak(lambda config=config: train(config)) for _ in range(times))
        guess = estimate.memory(config, ranks, min(4, config.data.global_batch_size // ranks), cuda=False).total
        ratios.append(guess / top)
    return ratios


if __name__ == "__main__":
    torch.set_num_threads(1)
    functions = {function.__name__: function for function in (passes, encoder, resident, training)}
    print("RESULT", json.dumps(functions[sys.argv[1]](*json.loads(sys.argv[2]))), flush=True)
