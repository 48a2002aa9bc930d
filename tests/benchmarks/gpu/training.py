"""A step of training: speed, memory, whether the host waits in it, and which kernels compute the attention."""

import statistics
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from sit_composer import precision
from sit_composer.autoencoder import AutoencoderSpec
from sit_composer.config.schema import Config, DataConfig, ModelConfig, network_arguments
from sit_composer.costs.estimate import GIB, fits, memory
from sit_composer.costs.gpus import peak_flops
from sit_composer.costs.live_bytes import Ledger
from sit_composer.sit import SiT
from sit_composer.transport import Transport
from tests.benchmarks.gpu.harness import Missing, Result, Rows, Setting, seconds_of, spread
from tests.benchmarks.gpu.without_composer import prepare

HAS_COMPOSER = prepare()
if HAS_COMPOSER:
    from sit_composer import lean  # which needs what only Composer needs

    lean.load("composer")

from sit_composer.algorithms.ema import EMA, EMAWeights  # noqa: E402 - after `prepare`
from sit_composer.training.model import ComposerSiT  # noqa: E402

VAE = AutoencoderSpec(name="-", scale=0.18215, shift=0.0, channels=4, downsample=8)
DECAY = 0.9999
STEPS = 10
TINY = {"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 2, "input_size": 8, "num_classes": 10}


def rows(setting: Setting, size: str) -> Rows:
    """The rows of a size, such as B/2."""
    steps = Steps(setting, size)
    return {
        f"{size} step, eager": (60, steps.eager),
        f"{size} host waits": (25, steps.waits),
        f"{size} attention": (25, steps.attention),
        f"{size} step, compiled": (80, steps.compiled),
        f"{size} Composer's Trainer": (45, steps.trainer),
    }


class Parts:
    """A network in training, as a run has it on one GPU."""

    def __init__(self, config: Config, device: str):
        with torch.device(device):
            self.network = SiT(**network_arguments(config.model))
        self.model = ComposerSiT(self.network, Transport(), VAE).to(device).train()
        self.trained = [p for p in self.network.parameters() if p.requires_grad]
        self.device = device
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0, fused=True)
        self.average = EMAWeights()
        self.average.start(SimpleNamespace(model=self.model))

    def step(self, batch: dict[str, Tensor]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with precision.autocast("bf16", self.device):
            losses = self.model(batch)
        self.model.loss(losses, batch).backward()
        self.optimizer.step()
        self.average.update(DECAY)


class Steps:
    """The rows of a size; the first finds the microbatch."""

    def __init__(self, setting: Setting, size: str):
        self.device, self.tiny = setting.device, setting.tiny
        model = ModelConfig(name=None, **TINY) if self.tiny else ModelConfig(name=f"SiT-{size}")
        data = DataConfig(local="-", global_batch_size=1)
        self.config = Config(run_name="-", model=model, data=data, precision="amp_bf16")
        self.microbatch = 0  # not known yet
        self.eager_rate = 0.0

    def batch(self) -> dict[str, Tensor]:
        """Random moments, labels and keys."""
        n, side = self.microbatch, self.config.model.input_size
        with torch.device(self.device):
            moments = torch.randn(n, 8, side, side).half().abs()  # so that standard deviations are positive
            labels, index = torch.arange(n) % self.config.model.num_classes, torch.arange(n)
            return {"moments": moments, "label": labels, "index": index, "key": torch.randint(2**62, (n,))}

    def find(self, parts: Parts) -> dict[str, Tensor]:
        """The batch of the first microbatch that fits, from the estimate down by halves."""
        if not self.microbatch:
            room = torch.cuda.mem_get_info()[1] / GIB if self.device == "cuda" else 0
            self.microbatch = fits(self.config, 1, room) if room else 4
        while self.microbatch:
            try:
                batch = self.batch()
                for _ in range(2):
                    parts.step(batch)
                if self.device == "cuda":
                    torch.cuda.synchronize()
                return batch
            except torch.OutOfMemoryError:
                batch = None
                parts.optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                self.microbatch //= 2
        raise RuntimeError("not one sample fits")

    def eager(self) -> Result:
        parts = Parts(self.config, self.device)
        result = self.measure(parts)
        self.eager_rate = result["images_per_second"]
        return result

    def compiled(self) -> Result:
        parts = Parts(self.config, self.device)
        backend = "aot_eager" if self.tiny else "inductor"
        for block in parts.network.blocks:
            block.compile(fullgraph=True, dynamic=False, backend=backend)
        start = time.perf_counter()
        self.find(parts)  # two steps
        seconds = time.perf_counter() - start
        result = self.measure(parts)
        ratio = {"of_eager": result["images_per_second"] / self.eager_rate} if self.eager_rate else {}
        return result | {"compile_seconds": seconds - 2e-3 * result["ms"], **ratio}

    def measure(self, parts: Parts) -> Result:
        """Speed and memory."""
        batch = self.find(parts)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = seconds_of(lambda: parts.step(batch), self.device, 2 if self.tiny else STEPS)
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else live_peak(parts, batch)
        data = replace(self.config.data, global_batch_size=self.microbatch)
        config = replace(self.config, data=data)
        predicted = memory(config, 1, self.microbatch, self.device == "cuda").total
        rate = self.microbatch / statistics.median(times)
        sizes = {"peak_gib": peak / GIB, "predicted_gib": predicted / GIB, "memory_ratio": predicted / peak}
        speed = {"microbatch": self.microbatch, "images_per_second": rate, **spread(times)}
        return {**speed, "mfu": mfu(parts.model, batch, rate), **sizes}

    def waits(self) -> Result:
        """Whether the host waits for the device in a step."""
        parts = Parts(self.config, self.device)
        batch = self.find(parts)
        try:
            if self.device == "cuda":
                torch.cuda.set_sync_debug_mode("error")
                parts.step(batch)
            else:
                with Refused():
                    parts.step(batch)
        except RuntimeError as error:
            return {"host_waits": True, "where": str(error).strip().splitlines()[0]}
        finally:
            if self.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        return {"host_waits": False}

    def attention(self) -> Result:
        """Which kernels computed the attention."""
        parts = Parts(self.config, self.device)
        for block in parts.network.blocks:
            block.attn.attend = scaled_dot_product_attention  # on a CPU, too, which stands for a GPU here
        batch = self.find(parts)
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.device == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds) as profile:
            parts.step(batch)
            torch.cuda.synchronize() if self.device == "cuda" else None
        words = ("flash", "fmha", "sdpa", "attention")
        names = {event.key for event in profile.key_averages() if any(word in event.key.lower() for word in words)}
        kernels = sorted(name[:120] for name in names if not name.startswith("aten::scaled"))
        return {"flash": any("flash" in name.lower() for name in names), "kernels": kernels}

    def trainer(self) -> Result:
        """Composer's Trainer instead of the plain step."""
        if not HAS_COMPOSER:  # but what stands in for it
            raise Missing("composer is not installed")
        from composer import Trainer  # optional

        parts = Parts(self.config, self.device)
        batch, ema, steps = self.find(parts), EMA(DECAY), 2 if self.tiny else STEPS
        del parts.average
        made = Trainer(
            model=parts.model, optimizers=parts.optimizer, train_dataloader=[batch] * steps, algorithms=[ema],
            callbacks=[ema.weights], device_train_microbatch_size=self.microbatch, max_duration="0ba",
            precision="amp_bf16" if self.device == "cuda" else "fp32", progress_bar=False,
        )  # fmt: skip
        times = seconds_of(lambda: made.fit(duration=f"{steps}ba"), self.device, 3)
        made.close()
        rate = self.microbatch * steps / statistics.median(times)
        ratio = {"of_eager": rate / self.eager_rate} if self.eager_rate and self.device == "cuda" else {}
        each = spread([seconds / steps for seconds in times])
        return {"microbatch": self.microbatch, "images_per_second": rate, **each, **ratio}


def mfu(model: Any, batch: dict[str, Tensor], rate: float) -> float | None:
    """Of the GPU's peak; None where that isn't known."""
    peak = peak_flops("bf16")
    return model.flops_per_batch(batch) / len(batch["label"]) * rate / peak if peak else None


def live_peak(parts: Parts, batch: dict[str, Tensor]) -> int:
    """The most bytes of a step on a CPU: those of the state, and what operators return."""
    state = [*parts.network.parameters(), *parts.average.params.values()]
    state += [t for values in parts.optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
    parts.optimizer.zero_grad(set_to_none=True)
    with torch.compiler.set_stance("force_eager"), Ledger([*state, *batch.values()]) as ledger:
        parts.step(batch)  # in a mode nothing is compiled, which torch 2.14 refuses under fullgraph
    return max(ledger.history) + sum(tensor.nbytes for tensor in state)


class Refused(TorchDispatchMode):
    """On a CPU, refuses the operators for which the host would wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"):
            raise RuntimeError(f"{func._schema.name} reads from the device")
        return func(*args, **(kwargs or {}))
