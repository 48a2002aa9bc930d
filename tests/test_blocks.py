"""Newer blocks: each option against a published code's numbers, a closed form, or torch."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import rms_norm, softmax
from torch.utils.flop_counter import FlopCounterMode

from sit_composer.blocks import SwiGLU, block_norm, head_norm
from sit_composer.checkpoint.export import write_folder
from sit_composer.checkpoint.record import Checkpoint, Record
from sit_composer.choices import BLOCKS
from sit_composer.embedders import Rotations, rotate
from sit_composer.sit import SiT, build_sit
from tests.helpers.networks import NEWER, SPEC, small_network
from tests.helpers.paths import REFERENCE, ROOT
from tests.reference.blocks import CASES, SIZES, fill_network, results

ONE_BY_ONE = [{name: NEWER[name]} for name in BLOCKS if name != "class_tokens_start"]


def network_of(case: str) -> SiT:
    network = SiT(**SIZES, **CASES[case][0], learn_sigma=False)
    fill_network(network)
    return network


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_published_code(case, reference):
    known, got = reference("blocks"), results(network_of(case))
    torch.testing.assert_close(got["out"], known[f"{case}/out"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got["grad_norms"], known[f"{case}/grad_norms"], rtol=1e-4, atol=1e-6)


def test_the_turning_angles_are_those_of_the_published_code(reference):
    for name, buffer in network_of("LightningDiT").feat_rope.named_buffers():
        torch.testing.assert_close(buffer, reference("blocks")[f"feat_rope.{name}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["LightningDiT-B/1", "LightningDiT-XL/1"])
def test_a_named_networks_state_dict_is_the_released_ones(name):
    known = json.loads((REFERENCE / "blocks.json").read_text())[name]
    with torch.device("meta"):
        network = build_sit(name, input_size=16, in_channels=32)
    shapes = {re.sub(r"^blocks\.\d+", "blocks.*", key): list(t.shape) for key, t in network.state_dict().items()}
    assert {"depth": len(network.blocks), **shapes} == known


def test_a_checkout_of_the_published_code_gives_these_numbers_and_loads_strictly(tmp_path):
    """LIGHTNINGDIT and RIT are paths of checkouts; see tests/reference/blocks.py."""
    checkouts = [os.environ.get(name) for name in ("LIGHTNINGDIT", "RIT")]
    if not all(checkouts):
        pytest.skip("the environment names no LIGHTNINGDIT and RIT")
    command = [sys.executable, "-m", "tests.reference.blocks", *checkouts, "--out", str(tmp_path), "--weights"]
    subprocess.run(command, cwd=ROOT, check=True)
    now, known = load_file(tmp_path / "blocks.safetensors"), load_file(REFERENCE / "blocks.safetensors")
    assert now.keys() == known.keys()
    for name, value in now.items():
        torch.testing.assert_close(value, known[name], rtol=1e-5, atol=1e-5)
    assert (tmp_path / "blocks.json").read_text() == (REFERENCE / "blocks.json").read_text()
    for file in tmp_path.glob("*.pt"):
        network = SiT(**SIZES, **CASES[file.stem][0], learn_sigma=False)
        network.load_state_dict(torch.load(file, weights_only=True)["ema"], strict=True)
        torch.testing.assert_close(results(network)["out"], now[f"{file.stem}/out"], rtol=1e-5, atol=1e-5)
    assert len(list(tmp_path.glob("*.pt"))) == 3


def test_an_export_with_every_option_is_read_again_to_the_bit(tmp_path):
    network, source = small_network(**NEWER).eval(), tmp_path / "source"
    source.write_bytes(b"")
    sizes = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    record = Record(sizes | NEWER, {}, SPEC, list("abcdefghij"))
    checkpoint = Checkpoint(network.state_dict(), "ema", record, 3, str(source))
    write_folder(tmp_path / "export", {"ema.safetensors": checkpoint}, {})
    again, given = SiT.from_pretrained(str(tmp_path / "export")), (torch.randn(1, 4, 8, 8), torch.rand(1))
    assert torch.equal(again(*given, torch.tensor([3])), network(*given, torch.tensor([3])))


# --- Each option by itself ---


@given(st.integers(1, 8), st.data())
def test_a_rotated_product_depends_on_the_tokens_distance_alone(grid, data):
    """Equation 16 of arXiv 2104.09864, for each axis."""
    angles, place = Rotations(16, 8), st.integers(0, 7 - (grid - 1))
    a, b = ((data.draw(st.integers(0, grid - 1)), data.draw(st.integers(0, grid - 1))) for _ in range(2))
    moved = data.draw(place), data.draw(place)
    q, k = torch.randn(2, 1, 1, 64, 16, generator=torch.Generator().manual_seed(0))
    q, k = q[:, :, :1].expand(1, 1, 64, 16), k[:, :, :1].expand(1, 1, 64, 16)  # the same at each position
    products = rotate(q, *angles())[0, 0] @ rotate(k, *angles())[0, 0].T
    here = products[a[0] * 8 + a[1], b[0] * 8 + b[1]]
    there = products[(a[0] + moved[0]) * 8 + a[1] + moved[1], (b[0] + moved[0]) * 8 + b[1] + moved[1]]
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


def test_rotation_keeps_lengths_and_the_dtype_and_the_first_token():
    x, angles = torch.randn(2, 3, 16, 8), Rotations(8, 4)
    turned = rotate(x, *angles())
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])  # at row 0 and column 0
    assert not torch.allclose(turned[:, :, 1], x[:, :, 1])
    assert not torch.allclose(turned[:, :, 4], x[:, :, 4])
    assert rotate(x.bfloat16(), *angles()).dtype == torch.bfloat16
    joined = torch.cat([x[:, :, :2], x], dim=2)
    assert torch.equal(rotate(joined, *angles(2)), torch.cat([x[:, :, :2], turned], dim=2))


def test_norms_are_torchs_and_the_formula():
    x, gain = torch.randn(2, 5, 8), torch.rand(8)
    for norm in (block_norm(8, rms_norm=True), head_norm(8, rms_norm=True)):
        norm.weight.data.copy_(gain)
        torch.testing.assert_close(norm(x), rms_norm(x, (8,), gain, eps=1e-6))
        torch.testing.assert_close(norm(x), x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain)
    assert not list(block_norm(8, rms_norm=False).parameters())


def test_normalized_queries_and_keys_bound_the_logits():
    """|q · k| / √width is at most √width, whatever the weights: at equal gains, attention can't saturate."""
    network = small_network(qk_norm=True, rms_norm=True)
    attn = network.blocks[0].attn
    attn.qkv.weight.data.mul_(1000)
    q, k, _ = (part.unflatten(-1, (2, 16)) for part in attn.qkv(torch.randn(2, 16, 32)).chunk(3, dim=-1))
    for norm in (attn.q_norm, attn.k_norm):
        norm.weight.data.fill_(1)
    logits = torch.einsum("nqhd,nkhd->nhqk", attn.q_norm(q), attn.k_norm(k)) / 4
    assert logits.abs().max() <= 4.001
    assert softmax(logits, dim=-1).max() < 0.999


def test_swiglu_has_the_parameters_of_the_mlp_in_its_place():
    layer = SwiGLU(1152, 4608)
    assert (layer.w12.out_features, layer.w3.in_features) == (2 * 3072, 3072)
    maps = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    assert maps == 2 * 1152 * 4608
    x = torch.randn(2, 3, 1152)
    gate, value = (layer.w12(x)[..., part] for part in (slice(0, 3072), slice(3072, None)))
    torch.testing.assert_close(layer(x), layer.w3(gate * gate.sigmoid() * value))


def test_a_shared_modulation_is_one_of_each_block_with_another_bias():
    shared, apart = small_network(shared_adaln=True), small_network()
    weights = shared.state_dict()
    for i, block in enumerate(apart.blocks):
        own = {"1.weight": weights["adaLN_modulation.1.weight"]}
        own["1.bias"] = weights["adaLN_modulation.1.bias"] + weights[f"blocks.{i}.adaLN_modulation.table"]
        block.adaLN_modulation.load_state_dict(own)
    apart.load_state_dict({name: value for name, value in weights.items() if name in apart.state_dict()}, strict=False)
    given = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])
    torch.testing.assert_close(shared(*given), apart(*given))


def test_class_tokens_carry_the_label_and_leave_before_the_output():
    network = small_network(class_tokens=3, class_tokens_start=1).eval()
    lengths = []
    for module in (*network.blocks, network.final_layer):
        module.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])
    with torch.no_grad():
        out = network(x, t, y)
        assert torch.equal(network(x, t, network.y_embedder(y, False)), out)  # as solvers call it
    assert lengths[:3] == [16, 19, 16]
    for block in network.blocks:  # without the modulation's path, the tokens still tell the label
        torch.nn.init.zeros_(block.adaLN_modulation[-1].weight)
    torch.nn.init.zeros_(network.final_layer.adaLN_modulation[-1].weight)
    assert not torch.allclose(network(x, t, y), network(x, t, y.flip(0)))


@pytest.mark.parametrize("options", [*ONE_BY_ONE, NEWER], ids=lambda options: " ".join(options))
def test_macs_are_those_that_torch_counts(options):
    network = SiT(hidden_size=64, depth=3, num_heads=4, input_size=16, num_classes=5, **options)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(torch.randn(1, 4, 16, 16), torch.rand(1), torch.tensor([1]))
    assert counter.get_total_flops() == 2 * network.forward_macs()


@pytest.mark.parametrize("options", ONE_BY_ONE, ids=lambda options: " ".join(options))
def test_an_option_changes_the_field_and_a_new_network_is_still_zero(options):
    given = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])
    new = SiT(hidden_size=32, depth=2, num_heads=2, input_size=8, num_classes=10, **options).eval()
    assert new(*given).abs().max() == 0
    assert torch.equal(
        new.blocks[0](torch.ones(2, 16, 32), torch.zeros(2, 32 * (6 if "shared_adaln" in options else 1))),
        torch.ones(2, 16, 32),
    )
    plain, other = small_network(), small_network(**options)
    other.load_state_dict({n: v for n, v in plain.state_dict().items() if n in other.state_dict()}, strict=False)
    assert not torch.allclose(plain.eval()(*given), other.eval()(*given))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"rotary": True, "hidden_size": 36, "num_heads": 6}, "num_heads: got 6, whose heads are 6 wide, .* rotary"),
        ({"class_tokens": -1}, "class_tokens: got -1, expected a whole number of at least 0"),
        ({"class_tokens_start": 1}, "class_tokens_start: got 1, expected 0, as class_tokens is 0"),
        ({"class_tokens": 2, "class_tokens_start": 2}, "class_tokens_start: got 2, expected one of the 2 blocks"),
    ],
)
def test_options_that_do_not_fit_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        SiT(**{"depth": 2, "hidden_size": 32, "num_heads": 2, **arguments})
