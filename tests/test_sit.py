import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sit_composer.choices import VARIANTS
from sit_composer.sit import SiT, build_sit, sincos_positions, size_table
from sit_composer.transport import Transport
from tests.helpers.paths import ROOT


def test_outputs_losses_and_gradients_are_the_references(tiny, reference, meta):
    io = reference("tiny_a.io")
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(tiny(io["x"], io["t"], io["y"]), io["forward"], **close)
    twice = [torch.cat([io[k], io[k]]) for k in ("x", "t")]
    labels = torch.cat([io["y"], torch.full_like(io["y"], tiny.null_label)])
    torch.testing.assert_close(tiny.forward_with_cfg(*twice, labels, 4.0), io["forward_with_cfg_4"], **close)

    tr = Transport()
    xt = tr.path.interpolate(io["t"], io["x0"], io["x"])[0]
    loss = tr.loss(tiny(xt, io["t"], io["y"]), io["t"], io["x0"], io["x"])
    torch.testing.assert_close(loss, io["loss"], rtol=1e-4, atol=0)
    loss.mean().backward()
    assert [name for name, _ in tiny.named_parameters()] == meta["tiny_a"]["grad_norm_order"]
    norms = [torch.zeros(()) if p.grad is None else p.grad.norm() for p in tiny.parameters()]
    torch.testing.assert_close(torch.stack(norms), io["grad_norms"], rtol=1e-4, atol=1e-8)


def test_sizes_are_the_published_ones():
    published = {"S": (33, 6.1), "B": (130, 23.0), "L": (458, 80.7), "XL": (675, 118.6)}
    for size, (millions, gmacs) in published.items():
        with torch.device("meta"):
            network = build_sit(f"SiT-{size}/2")
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        assert round(trained / 1e6) == millions
        assert round(network.forward_macs() / 1e9, 1) == gmacs


def test_the_readme_has_the_table_of_sizes_that_the_code_computes():
    table = size_table()
    assert all(name in table for name in VARIANTS)
    assert table in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("arguments", [{}, {"learn_sigma": False, "patch_size": 4, "class_dropout_prob": 0.0}])
def test_macs_are_those_that_torch_counts(arguments):
    network = SiT(hidden_size=64, depth=3, num_heads=4, input_size=16, num_classes=5, **arguments)
    # torch's counter knows no fused attention on the CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(torch.randn(1, 4, 16, 16), torch.rand(1), torch.tensor([1]))
    assert counter.get_total_flops() == 2 * network.forward_macs()


def test_a_new_network_is_zero_and_its_blocks_are_the_identity():
    network = SiT(hidden_size=64, depth=2, num_heads=4, input_size=8, num_classes=5)
    assert network(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 4])).abs().max() == 0
    x, c = torch.randn(2, 16, 64), torch.randn(2, 64)
    assert torch.equal(network.blocks[0](x, c), x)


def test_labels_are_dropped_in_training_alone_and_as_often_as_asked():
    torch.manual_seed(0)
    embed = SiT(hidden_size=64, depth=0, num_heads=4, input_size=8, num_classes=5, class_dropout_prob=0.25).y_embedder
    labels = torch.zeros(10000, dtype=torch.long)
    null = embed.embedding_table.weight[5]
    dropped = (embed(labels, train=True) == null).all(1)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert not (embed(labels, train=False) == null).all(1).any()


def test_without_dropout_there_is_no_null_class():
    network = SiT(hidden_size=64, depth=0, num_heads=4, input_size=8, num_classes=5, class_dropout_prob=0)
    assert network.null_label is None
    assert len(network.y_embedder.embedding_table.weight) == 5


def test_positions_tell_every_cell_apart():
    positions = sincos_positions(64, 8)[0]
    distances = torch.cdist(positions, positions) + torch.eye(64) * 1e9
    assert distances.min() > 0.5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"hidden_size": 100, "num_heads": 16}, r"hidden_size: got 100, expected a multiple of num_heads \(16\)"),
        ({"hidden_size": 18, "num_heads": 2}, r"hidden_size: got 18, .* and of 4"),
        ({"input_size": 33}, r"input_size: got 33, expected a multiple of patch_size \(2\)"),
    ],
)
def test_sizes_that_do_not_fit_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        SiT(**{"depth": 1, **arguments})


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="SiT-XL/2"):
        build_sit("SiT-XXL/2")
