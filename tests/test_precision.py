import pytest
import torch

from sit_composer.errors import UserError
from sit_composer.precision import autocast, resolve


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "expected"), [(False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")]
)
def test_auto_is_bfloat16_where_the_processor_has_it(monkeypatch, avx512_bf16, amx, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert resolve("auto", "cpu") == expected
    assert (resolve("bf16", "cpu"), resolve("fp32", "cpu")) == ("bf16", "fp32")  # torch emulates it


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (10, 0)])
def test_a_gpu_without_bfloat16_is_named(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    if capability < (8, 0):
        assert resolve("auto", "cuda") == "fp32"
        for precision in ("bf16", "amp_bf16"):
            with pytest.raises(UserError, match=f"got {precision}, expected .*fp32: Tesla T4 has no bfloat16"):
                resolve(precision, "cuda")
    else:
        assert resolve("auto", "cuda") == "bf16"
        assert resolve("amp_bf16", "cuda") == "amp_bf16"


def test_a_gpus_float32_products_take_tf32_within_the_context_alone():
    matmul = torch.backends.cuda.matmul
    assert not matmul.allow_tf32
    with autocast("fp32", "cuda"):
        assert matmul.allow_tf32
    assert not matmul.allow_tf32


def test_autocast_is_of_the_precision():
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(precision, "cpu"):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
