"""One side of `step.py` in a process of its own: the authors' loop, ours, the limit, or the limit with torch's maps.

It makes a step for each line of input, and prints the step's seconds; when the input ends, the peak of its memory in
MiB, above what the libraries took. So each side allocates its memory as it would where it is used.
"""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sit_composer import linear
from sit_composer.algorithms.ema import EMA
from sit_composer.autoencoder import AutoencoderSpec
from sit_composer.precision import DTYPES
from sit_composer.sit import Attention, SiT, build_sit
from sit_composer.training.compiling import compile_blocks
from sit_composer.training.model import ComposerSiT
from sit_composer.training.trainer import Trainer
from sit_composer.transport import Transport

LATENTS = AutoencoderSpec(name="-", scale=1.0, shift=0.0, channels=4, downsample=8)
DECAY, DEVICE = 0.9999, "cuda" if torch.cuda.is_available() else "cpu"


def main(argv: list[str] | None = None) -> int:
    """Runs one side; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("theirs", "ours", "limit", "plain"))
    parser.add_argument("--sit", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args(argv)
    if args.side == "plain":  # the limit of nn.Linear
        linear.CONVOLUTIONS = False
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    network, batch = make_network(args.model), make_batch(args.batch)
    turns = Turns(batch, iter(sys.stdin.readline, ""))
    if args.side == "ours":
        trainer(network, turns, args.precision, args.compile).fit()
    else:
        step = limit(network, args.batch, args.precision)
        if args.side == "theirs":
            step = Theirs(network, batch, args.sit, args.model).step
        for _ in turns:
            step()
    print(torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else memory("VmHWM") - before, flush=True)
    return 0


def memory(name: str) -> float:
    """A figure of this process, in MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


class Turns:
    """A dataloader of one batch: waits for a start before each step, and prints its seconds."""

    def __init__(self, batch: dict[str, Tensor], starts: Iterator[object]):
        self.batch, self.starts = batch, starts

    def __len__(self) -> int:
        return 2**40  # it is the input that ends

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        print("ready", flush=True)
        for _ in self.starts:
            start = time.perf_counter()
            yield self.batch
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            print(time.perf_counter() - start, flush=True)  # the Trainer asks for a batch when all callbacks are done


def make_network(model: str) -> SiT:
    """The same for all sides, and with no gradient of zero."""
    torch.manual_seed(0)
    network = build_sit(model)
    nn.init.normal_(network.final_layer.linear.weight, std=0.02)
    return network


def make_batch(samples: int) -> dict[str, Tensor]:
    """Random latents (as moments without deviation), labels and keys, on the device."""
    latents = torch.randn(samples, 4, 32, 32)
    batch = {"moments": torch.cat([latents, torch.zeros_like(latents)], 1), "key": torch.randint(2**62, (samples,))}
    batch |= {"label": torch.arange(samples), "index": torch.arange(samples)}
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


class Theirs:
    """The authors' loop, from their own files, or a plain one. ``step()`` returns its loss."""

    def __init__(self, network: SiT, batch: dict[str, Tensor], sit: Path | None, model: str):
        self.network, self.x1, self.labels = network, batch["moments"].chunk(2, 1)[0], batch["label"]
        self.transport = Transport()
        self.loss = lambda: self.transport.training_loss(self.network, self.x1, y=self.labels)
        if sit:
            models, create_transport = load_peer(sit)
            self.network = models.SiT_models[model](input_size=network.input_size, num_classes=1000)
            self.network.load_state_dict(network.state_dict())
            self.transport = create_transport()
            self.loss = lambda: self.transport.training_losses(self.network, self.x1, {"y": self.labels})["loss"]
        self.network.to(DEVICE).train()
        self.average = deepcopy(self.network).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, weight_decay=0)

    def step(self) -> Tensor:
        loss = self.loss().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for kept, p in zip(self.average.parameters(), self.network.parameters(), strict=True):
                kept.mul_(DECAY).add_(p, alpha=1 - DECAY)
        return loss


def load_peer(path: Path) -> tuple:
    """Their modules ``models``, and their ``create_transport``."""
    sys.path.insert(0, str(path))
    try:
        import models  # theirs
        from transport import create_transport
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"error: {path}: {error}; a clone of willisma/SiT is expected, and pip install -e '.[bench]'"
        ) from None
    finally:
        sys.path.remove(str(path))
    return models, create_transport


def trainer(network: SiT, batches: Turns, precision: str, compiled: bool = False, callbacks: tuple = ()) -> Trainer:
    """Composer's Trainer, as `sit_composer.train` makes it; it trains the network itself."""
    ema = EMA(DECAY)
    if compiled:
        compile_blocks(network, "inductor")
    trained = [p for p in network.parameters() if p.requires_grad]
    return Trainer(
        model=ComposerSiT(network, Transport(), LATENTS, precision=precision),
        optimizers=torch.optim.AdamW(trained, lr=1e-4, weight_decay=0, fused=True),
        train_dataloader=batches,
        algorithms=[ema],
        callbacks=[ema.weights, *callbacks],
        device_train_microbatch_size=len(batches.batch["label"]),
        max_duration="1ep",
        precision="fp32",
        progress_bar=False,
    )


def limit(network: SiT, samples: int, precision: str) -> Callable[[], object]:
    """The step's matrix products and attention alone: three products a linear map, and attention both ways."""
    calls: list[tuple[nn.Module, Tensor]] = []
    inner = [module for module in network.modules() if isinstance(module, nn.Linear | Attention)]
    hooks = [m.register_forward_hook(lambda module, args, _: calls.append((module, args[0]))) for m in inner]
    size = (samples, network.in_channels, network.input_size, network.input_size)
    with torch.no_grad():
        network(torch.zeros(size), torch.zeros(samples), torch.zeros(samples, dtype=torch.long))
    for hook in hooks:
        hook.remove()
    parts = [(attention if isinstance(m, Attention) else products)(m, x.shape, DTYPES[precision]) for m, x in calls]
    return lambda: [part() for part in parts]


def products(layer: nn.Linear, shape: torch.Size, dtype: torch.dtype) -> Callable[[], object]:
    """A linear map's output without its bias, and its gradients, by the library that the map itself takes."""
    made = deepcopy(layer).to(DEVICE, dtype)
    made.bias = None
    x = torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True)
    g = torch.randn(*shape[:-1], len(made.weight), dtype=dtype, device=DEVICE)

    def products() -> None:
        torch.autograd.grad(made(x), (x, made.weight), g)

    return products


def attention(layer: Attention, shape: torch.Size, dtype: torch.dtype) -> Callable[[], object]:
    """Attention and its gradients, without the linear maps around it."""
    n, tokens, d = shape
    made = torch.randn(4, n, tokens, layer.num_heads, d // layer.num_heads, dtype=dtype, device=DEVICE).transpose(2, 3)
    q, k, v = (part.requires_grad_() for part in made[:3].unbind())

    def attention() -> None:
        torch.autograd.grad(scaled_dot_product_attention(q, k, v), (q, k, v), made[3])

    return attention


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    sys.exit(main())
