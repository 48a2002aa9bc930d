"""The noise and the loss of a step, by themselves: elementwise, so that memory is their limit.

GB/s counts what must be moved: the noise that is written; the output, noise and data that the loss reads, and the
gradient that it writes.
"""

import statistics
from collections.abc import Callable

import torch

from sit_composer import randomness
from sit_composer.transport import Transport
from tests.benchmarks.gpu.harness import Result, Rows, Setting, seconds_of, spread


def rows(setting: Setting) -> Rows:
    device = torch.device(setting.device)
    samples, side = (8, 8) if setting.tiny else (1024, 32)
    shape = (4, side, side)
    bytes_each = 4 * samples * 4 * side * side
    keys = torch.randint(2**62, (samples,), device=device)
    x0, x1 = torch.randn(2, samples, *shape, device=device)
    output = torch.randn(samples, *shape, device=device, requires_grad=True)
    t = torch.rand(samples, device=device)
    compiled = {"backend": "aot_eager" if setting.tiny else "inductor", "dynamic": False}

    def noise(keys: torch.Tensor) -> torch.Tensor:
        return randomness.normal(keys, randomness.X0, shape)

    def loss(output: torch.Tensor) -> torch.Tensor:
        return Transport().loss(output, t, x0, x1).mean()

    def with_gradient(function: Callable) -> Callable[[], None]:
        def call() -> None:
            output.grad = None
            function(output).backward()

        return call

    def measured(call: Callable[[], object], moved: int) -> Callable[[], Result]:
        def measure() -> Result:
            times = seconds_of(call, setting.device, 2 if setting.tiny else 50, warm_up=3)
            return {**spread(times), "gb_per_second": moved * bytes_each / statistics.median(times) / 1e9}

        return measure

    fast_noise, fast_loss = torch.compile(noise, **compiled), torch.compile(loss, **compiled)
    return {
        "noise of the samples' keys": (10, measured(lambda: noise(keys), 1)),
        "noise of the samples' keys, compiled": (30, measured(lambda: fast_noise(keys), 1)),
        "noise of torch.randn": (10, measured(lambda: torch.randn(samples, *shape, device=device), 1)),
        "loss and its gradient": (10, measured(with_gradient(loss), 4)),
        "loss and its gradient, compiled": (30, measured(with_gradient(fast_loss), 4)),
    }
