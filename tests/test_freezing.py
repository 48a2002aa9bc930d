"""Patterns of weights that aren't trained."""

import pytest

from sit_composer.errors import UserError
from sit_composer.freezing import freeze
from tests.helpers.networks import small_network


def frozen(*patterns: str) -> set[str]:
    network = small_network()
    freeze(network, patterns)
    return {name for name, p in network.named_parameters() if not p.requires_grad}


def test_patterns_freeze_the_weights_that_they_match():
    assert frozen() == {"pos_embed"}
    assert frozen("t_embedder.*", "*.0.attn.qkv.?ias") == {
        "pos_embed", "t_embedder.mlp.0.weight", "t_embedder.mlp.0.bias", "t_embedder.mlp.2.weight",
        "t_embedder.mlp.2.bias", "blocks.0.attn.qkv.bias",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["block.*"], "freeze: block.* matches no weight of the network, expected a pattern such as blocks.*"),
        (["blocks.0.attn.qvk.weight"], "expected a pattern such as blocks.0.attn.qkv.weight"),
        (["nonsense"], "expected a pattern such as x_embedder.*, t_embedder.*, y_embedder.*, blocks.*, final_layer.*"),
        (["*"], "freeze: got *, expected to leave weights that are trained"),
    ],
)
def test_a_pattern_without_a_match_names_the_nearest(patterns, message):
    with pytest.raises(UserError) as error:
        frozen(*patterns)
    assert message in str(error.value)
