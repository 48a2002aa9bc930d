"""Checks that need torch, on this machine's processors."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sit_composer.checkup import devices
from sit_composer.config.load import load_config
from sit_composer.costs.room import check_room
from sit_composer.errors import UserError
from tests.helpers.paths import ROOT

RUN = ["data.local=x", "trainer.save_folder=x"]
CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def quickstart(*overrides):
    return load_config(str(ROOT / "yamls/quickstart.yaml"), [*RUN, *overrides])


@CPU
def test_without_a_gpu_the_same_is_checked_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "version")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices.gpu().status == "not checked"
    (tmp_path / "version").write_text("NVRM version: 570")  # a driver, and torch can't use it
    with pytest.raises((RuntimeError, AssertionError)):
        devices.gpu()


@CPU
def test_bfloat16_is_computed_and_a_runs_precision_is_resolved(monkeypatch):
    assert devices.bfloat16("auto").text.endswith("here")
    with pytest.raises(UserError, match="there is no GPU here"):
        devices.bfloat16("amp_bf16")
    # A faulty device, but for float64, the reference.
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: torch.matmul(a, b).roll(int(a.dtype == torch.float32)))
    assert "relative error" in devices.bfloat16("fp32").text


def test_flash_attention_is_called_and_compared(monkeypatch):
    assert devices.attention_sizes(None) == (16, 72, 256)
    sizes = devices.attention_sizes(quickstart())
    assert sizes == (4, 32, 16)
    assert devices.flash_attention(*sizes).status == "ok"
    attend = devices.attend
    calls = iter((1.0, 1.1))  # a kernel that is wrong by a tenth
    monkeypatch.setattr(devices, "attend", lambda q, k, v: attend(q, k, v) * next(calls))
    assert devices.flash_attention(*sizes).status == "failed"


@CPU
def test_a_kernel_that_does_not_run_is_a_warning(monkeypatch):
    no_kernel = SDPBackend.CUDNN_ATTENTION  # which no CPU has
    monkeypatch.setattr(devices, "sdpa_kernel", lambda _: sdpa_kernel(no_kernel))
    found = devices.flash_attention(2, 8, 16)
    assert (found.status, found.advice) == ("warning", devices.FLASH)


@CPU
def test_the_runs_memory_is_that_of_its_estimate():
    found = devices.run_memory(quickstart(), {})
    assert (found.status, found.text) == ("ok", check_room(quickstart(), False, 1, 64))
    assert devices.run_memory(quickstart("precision=amp_bf16"), {}).status == "not checked"
