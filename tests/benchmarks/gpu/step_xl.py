"""The training step of SiT-XL/2."""

from tests.benchmarks.gpu import training
from tests.benchmarks.gpu.harness import Rows, Setting


def rows(setting: Setting) -> Rows:
    return training.rows(setting, "XL/2")
