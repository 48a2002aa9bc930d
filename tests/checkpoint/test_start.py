"""Weights for a network of other classes, another resolution or other output channels, from a checkpoint's."""

import argparse
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import interpolate

from sit_composer.checkpoint.load import load_checkpoint
from sit_composer.checkpoint.record import Checkpoint, Record
from sit_composer.checkpoint.safe_load import CheckpointError
from sit_composer.checkpoint.start import compare, label_rows, transfer
from sit_composer.embedders import Rotations, sincos_positions
from sit_composer.sit import SiT
from tests.helpers.networks import NEWER, SPEC, small_network

SIZES = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
TABLE = "y_embedder.embedding_table.weight"


def record_of(classes: list[str], **arguments) -> Record:
    return Record({**SIZES, **arguments, "num_classes": len(classes)}, {}, SPEC, classes)


def checkpoint_of(classes: list[str], **arguments) -> Checkpoint:
    record = record_of(classes, **arguments)
    network = small_network(**record.model)
    network.pos_embed.data = sincos_positions(32, 4)  # which no training changes
    return Checkpoint(network.state_dict(), "ema", record, 7, "before.pt")


def started(checkpoint: Checkpoint, classes: list[str], **arguments) -> tuple[SiT, SiT, dict[str, str]]:
    """A network that starts from the checkpoint, the same one as it was before, and what is told."""
    record = record_of(classes, **arguments)
    torch.manual_seed(5)
    network = record.build_network()
    torch.manual_seed(5)
    fresh = record.build_network()
    lines = compare(checkpoint.record, record, "before.pt")
    transfer(checkpoint, record, network)
    return network.eval(), fresh, lines


def outputs(network: SiT, labels: list[int], side: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(labels), 4, side, side, generator=generator)
    return network(x, torch.linspace(0.1, 0.9, len(labels)), torch.tensor(labels))


def test_classes_keep_their_rows_by_name_and_new_ones_are_fresh():
    before = checkpoint_of(["cat", "dog", "owl"])
    network, fresh, lines = started(before, ["ape", "owl", "cat", "yak"])
    rows, new, old = network.state_dict()[TABLE], fresh.state_dict()[TABLE], before.weights[TABLE]
    expected = torch.stack([new[0], old[2], old[0], new[3], old[3]])  # the null class's is the last
    assert torch.equal(rows, expected)
    rest = [name for name in before.weights if name != TABLE]
    assert [name for name in rest if not torch.equal(network.state_dict()[name], before.weights[name])] == []
    assert lines == {"classes": "2 of 4 keep their rows, by name; new: ape, yak; the null class is kept"}
    same = before.build_network()
    assert torch.equal(outputs(network, [2, 1, 4]), outputs(same, [0, 2, 3]))


@pytest.mark.parametrize(("theirs", "ours", "told"), [(0.1, 0.0, "left out"), (0.0, 0.1, "new"), (0.0, 0.0, None)])
def test_a_null_class_may_come_or_go(theirs, ours, told):
    before = checkpoint_of(["a", "b"], class_dropout_prob=theirs)
    network, fresh, lines = started(before, ["b"], class_dropout_prob=ours)
    rows = network.state_dict()[TABLE]
    assert torch.equal(rows[0], before.weights[TABLE][1])
    assert len(rows) == 1 + (ours > 0)
    assert torch.equal(rows[1:], fresh.state_dict()[TABLE][1:])
    end = f"; the null class is {told}" if told else ""
    assert lines == {"classes": f"1 of 1 keep their rows, by name{end}"}


def test_imagenets_classes_are_the_same_by_number_id_and_name():
    numbers = [str(label) for label in range(1000)]
    ours = ["Persian cat", "n01440764", "crane (bird)", "tench, Tinca tinca", "my cat", "3"]
    assert label_rows(numbers, ours) == [283, 0, 134, 0, None, 3]
    assert label_rows(["n01440764", "n01443537"], numbers)[:3] == [0, 1, None]
    assert label_rows(numbers, numbers) == list(range(1000))
    assert label_rows([*"0123456789"], ["8", "9", "tench"]) == [8, 9, None]  # ten classes aren't ImageNet's
    assert label_rows(["orange, ripe", "orange, green"], ["orange, green", "orange, ripe"]) == [1, 0]


def test_the_authors_file_is_started_from(tmp_path):
    weights = small_network(**SIZES).state_dict()
    torch.save({"ema": weights, "args": argparse.Namespace(num_heads=2, num_classes=3)}, tmp_path / "SiT.pt")
    network, _, lines = started(load_checkpoint(str(tmp_path / "SiT.pt")), ["2", "owl"])
    assert torch.equal(network.state_dict()[TABLE][[0, 2]], weights[TABLE][[2, 3]])
    assert lines["classes"] == "1 of 2 keep their rows, by name; new: owl; the null class is kept"
    assert "sd-vae-ft-ema" in lines["latents"]


@pytest.mark.parametrize(("theirs", "ours"), [(True, False), (False, True)])
def test_networks_with_and_without_the_unused_channels_give_the_same(theirs, ours):
    before = checkpoint_of(["a"], learn_sigma=theirs)
    network, fresh, lines = started(before, ["a"], learn_sigma=ours)
    assert torch.equal(outputs(network, [0, 1]), outputs(before.build_network(), [0, 1]))
    assert "learn_sigma" in lines["output"]
    if ours:
        added = network.final_layer.linear.weight.unflatten(0, (4, 8))[:, 4:]
        assert torch.equal(added, fresh.final_layer.linear.weight.unflatten(0, (4, 8))[:, 4:])


@pytest.mark.parametrize("arguments", [{}, NEWER])
def test_positions_of_another_resolution_lie_between_those_of_before(arguments):
    before = checkpoint_of(["a"], **arguments)
    network, _, lines = started(before, ["a"], input_size=16, **arguments)
    assert lines["positions"] == "4x4 tokens become 8x8, interpolated between the positions of before"
    table = network.pos_embed.unflatten(1, (8, 8))
    torch.testing.assert_close(table[:, ::2, ::2].flatten(1, 2), sincos_positions(32, 4))
    torch.testing.assert_close(network.pos_embed, sincos_positions(32, 8, 0.5))
    if arguments:
        torch.testing.assert_close(network.feat_rope.freqs_sin, Rotations(16, 8, 0.5).freqs_sin)
    assert outputs(network, [0, 1], side=16).isfinite().all()
    # From there to a third one and back: positions are those of the first, whatever the way.
    record = record_of(["a"], input_size=16, **arguments)
    middle = Checkpoint(network.state_dict(), "ema", record, 9, "middle.pt")
    further, _, _ = started(middle, ["a"], input_size=24, **arguments)
    torch.testing.assert_close(further.pos_embed, sincos_positions(32, 12, 1 / 3), rtol=0, atol=2e-5)
    back, _, _ = started(middle, ["a"], **arguments)
    assert [name for name, tensor in back.state_dict().items() if not torch.equal(tensor, before.weights[name])] == []


def test_a_table_that_is_learned_is_interpolated():
    before = checkpoint_of(["a"])
    learned = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    network, _, _ = started(replace(before, weights=before.weights | {"pos_embed": learned}), ["a"], input_size=16)
    maps = interpolate(learned.unflatten(1, (4, 4)).permute(0, 3, 1, 2), scale_factor=2, mode="bicubic")
    torch.testing.assert_close(network.pos_embed, maps.permute(0, 2, 3, 1).flatten(1, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"patch_size": 4},
            "model.patch_size: got 4, expected 2 as in before.pt; the maps of one size of patches don't",
        ),
        (
            {"in_channels": 3},
            "model.in_channels: got 3, expected 4 as in before.pt; the maps of one number of channels",
        ),
        ({"num_heads": 4}, "model.num_heads: got 4, expected 2 as in before.pt"),
        ({"depth": 3}, "model.depth: got 3, expected 2 as in before.pt"),
        ({"qk_norm": True}, "model.qk_norm: got True, expected False as in before.pt"),
    ],
)
def test_other_networks_are_refused_with_the_reason(arguments, message):
    with pytest.raises(CheckpointError) as error:
        compare(record_of(["a"]), record_of(["a"], **arguments), "before.pt")
    assert str(error.value).startswith(message)


def test_another_objective_is_refused_and_other_latents_are_told():
    for name, got, expected in (("prediction", "noise", "velocity"), ("path_type", "GVP", "Linear")):
        ours = replace(record_of(["a"]), transport={name: got})
        told = f"transport.{name}: got {got}, expected {expected}"
        with pytest.raises(CheckpointError, match=rf"^{told}, which before\.pt was trained"):
            compare(record_of(["a"]), ours, "before.pt")
    other = replace(SPEC, scale=0.7)
    lines = compare(record_of(["a"]), replace(record_of(["a"]), autoencoder=other), "before.pt")
    assert lines["latents"].startswith("warning: of (name='some/vae'")
    assert "latents" not in compare(record_of(["a"]), replace(record_of(["a"]), autoencoder=None), "before.pt")


def test_classes_that_are_numbers_may_mean_others():
    told = compare(record_of([*"0123"]), record_of([*"01"]), "before.pt")["classes"]
    assert told.startswith(
        "warning: 2 of 2 keep their rows, by name, which are numbers in both; give the classes names"
    )
    for theirs, ours in (("01", "01"), ("01", "0123"), ("0123", "ab"), ("abcd", "01")):
        assert "warning" not in compare(record_of([*theirs]), record_of([*ours]), "before.pt")["classes"]


def test_a_network_of_one_token_is_started_from():
    record = record_of(["a"], input_size=2, **NEWER)
    weights = small_network(**record.model).state_dict() | {"pos_embed": sincos_positions(32, 1)}
    network, _, _ = started(Checkpoint(weights, "ema", record, 7, "one.pt"), ["a"], **NEWER)
    torch.testing.assert_close(network.pos_embed, sincos_positions(32, 4, 1 / 4))
    torch.testing.assert_close(network.feat_rope.freqs_cos, Rotations(16, 4, 1 / 4).freqs_cos)


def test_rotations_that_are_none_of_positions_are_refused():
    before = checkpoint_of(["a"], **NEWER)
    foreign = replace(before, weights=before.weights | {"feat_rope.freqs_cos": torch.zeros(16, 16)})
    with pytest.raises(CheckpointError, match=r"input_size: before\.pt has rotations of positions that no SiT has"):
        started(foreign, ["a"], input_size=16, **NEWER)
