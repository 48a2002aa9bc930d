"""Alignment, and SRA, which needs nothing from outside: the published numbers, and what a run has of it."""

import json
from types import SimpleNamespace

import pytest
import torch
from composer.core import Event
from composer.loggers import InMemoryLogger
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from sit_composer import export
from sit_composer.algorithms.ema import EMA
from sit_composer.algorithms.sra import SRA
from sit_composer.checkpoint.load import load_checkpoint
from sit_composer.config.schema import AlignmentConfig, FSDPConfig
from sit_composer.sit import SiT
from sit_composer.training.compiling import compile_blocks
from sit_composer.training.model import ComposerSiT
from sit_composer.training.sharding import parallelism
from sit_composer.training.trainer import Trainer
from sit_composer.transport import Transport
from tests.helpers.networks import NEWER, SPEC, batch, small_network
from tests.helpers.paths import ROOT
from tests.helpers.runs import bits, differences, state_of
from tests.reference.sra import norms, ours

DEEP = ["model.depth=3", "trainer.device_train_microbatch_size=24"]  # of 64
ALIGNED = [*DEEP, "alignment={name: sra, block: 1, teacher_block: 2}"]


def aligned(seed: int = 0, **options) -> tuple[ComposerSiT, EMA]:
    network, transport, ema = small_network(depth=4, **options), Transport(), EMA(0.9)
    config = AlignmentConfig("sra", block=1, teacher_block=3)
    return ComposerSiT(network, transport, SPEC, alignment=SRA(config, network, transport, ema.weights, seed=seed)), ema


def step(model: ComposerSiT, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parts of the loss, as the Trainer gets them."""
    state = SimpleNamespace(loss=model.loss(model(data), data))
    assert model.alignment.match(Event.AFTER_LOSS, state)
    model.alignment.apply(Event.AFTER_LOSS, state, None)
    return state.loss


def test_losses_and_gradients_are_those_of_the_published_code():
    known = json.loads((ROOT / "tests/reference/sra.json").read_text())
    model, data = ours(), batch()
    averages = [p.requires_grad_() for p in model.alignment.weights.params.values()]
    torch.testing.assert_close(model(data), torch.tensor(known["denoising"]), rtol=1e-5, atol=0)
    loss = step(model, data)
    assert loss["alignment"].item() == pytest.approx(known["alignment"], rel=1e-5)
    assert loss["total"].item() == pytest.approx(loss["denoising"].item() + 0.2 * known["alignment"], rel=1e-6)
    loss["total"].backward()
    assert norms(model, {"network.": ""}) == pytest.approx(known["grad_norms"], rel=1e-4)
    assert all(p.grad is None for p in averages)  # the teacher isn't trained


def test_the_projector_depends_on_the_seed_alone_and_changes_no_other_draw():
    network, drawn = small_network(), []
    for seed in (0, 0, 1):
        torch.rand(3)  # another state of torch's generator
        before = torch.get_rng_state()
        drawn.append(SRA(AlignmentConfig("sra"), network, Transport(), None, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
    weights = [alignment.projector.state_dict() for alignment in drawn]
    assert differences(weights[0], weights[1]) == []
    assert not torch.equal(weights[0]["0.weight"], weights[2]["0.weight"])


def test_an_evaluation_is_as_without_alignment():
    model, plain = aligned()[0].eval(), ComposerSiT(small_network(depth=4), Transport(), SPEC).eval()
    assert torch.equal(model.eval_forward(batch()), plain.eval_forward(batch()))


def test_flops_of_a_step_count_projector_and_teacher():
    model, ema = aligned()
    ema.weights.start(SimpleNamespace(model=model))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # as in test_sit.py
        model(batch())
    teacher = 2 * 6 * model.network.forward_macs(3)
    assert model.flops_per_batch(batch()) == 3 * (counter.get_total_flops() - teacher) + teacher


def test_a_step_with_a_teacher_never_waits_for_the_device():
    model, ema = aligned()
    model.to("meta")
    ema.weights.start(SimpleNamespace(model=model))
    loss = step(model, {name: tensor.to("meta") for name, tensor in batch().items()})
    loss["total"].backward()
    assert loss["alignment"].is_meta


def train(precision: str = "fp32", fsdp: FSDPConfig | None = None, compiled: bool = False, **options) -> dict:
    """What 3 steps log, of 8 samples in microbatches of 3, or of the given size."""
    model, ema = aligned(**{name: value for name, value in options.items() if name != "microbatch"})
    model.precision = model.alignment.precision = precision
    if compiled:
        compile_blocks(model.network, "aot_eager")
    columns, log = batch(24), InMemoryLogger()
    rows = [{name: column[i] for name, column in columns.items()} for i in range(24)]
    trainer = Trainer(
        model=model, train_dataloader=DataLoader(rows, batch_size=8), max_duration="3ba", precision="fp32", seed=0,
        optimizers=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), loggers=[log],
        algorithms=[ema, model.alignment], callbacks=[ema.weights], parallelism_config=parallelism(fsdp),
        device_train_microbatch_size=options.get("microbatch", 3), progress_bar=False,
    )  # fmt: skip
    trainer.fit()
    assert not any("projector" in name for name in ema.weights.params)
    parts = ("total", "denoising", "alignment")
    return {part: [value for _, value in log.data[f"loss/train/{part}"]] for part in parts}


@pytest.mark.parametrize(
    ("way", "rel"),
    [
        ({"microbatch": 8}, 1e-5),
        ({"fsdp": FSDPConfig()}, 1e-5),
        ({"fsdp": FSDPConfig(activation_checkpointing=True)}, 1e-5),
        ({"compiled": True}, 1e-5),
        ({"precision": "bf16"}, 1e-2),
        ({"precision": "bf16", "compiled": True, "fsdp": FSDPConfig()}, 1e-2),
    ],
)
def test_every_way_to_train_has_the_same_losses(way, rel):
    torch._dynamo.reset()  # other tests' graphs count towards its limit
    expected, got = train(), train(**way)
    for part, losses in expected.items():
        assert got[part] == pytest.approx(losses, rel=rel), part
    assert expected["alignment"][2] < expected["alignment"][0]


def test_newer_blocks_are_aligned_without_the_tokens_of_the_class():
    plain, sharded = train(**NEWER), train(fsdp=FSDPConfig(), **NEWER)
    assert sharded["alignment"] == pytest.approx(plain["alignment"], rel=1e-5)


def test_a_run_resumes_to_the_bit_and_its_projector_is_in_no_export(run, tmp_path, capsys):
    assert run("trainer.max_duration=8ba", *ALIGNED, folder="whole") == 0
    assert run("trainer.max_duration=3ba", *ALIGNED) == 0
    assert run("trainer.max_duration=8ba", *ALIGNED) == 0
    assert differences(bits(tmp_path / "whole"), bits(tmp_path / "run")) == []
    held = [name for name in state_of(tmp_path / "run")["model"] if not name.startswith("network.")]
    assert held == [f"projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    assert export.main([str(tmp_path / "run"), "--out", str(tmp_path / "export")]) == 0
    for weights in ("training", "ema"):
        network = load_checkpoint(str(tmp_path / "run"), weights).build_network()  # strictly
        exported = SiT.from_pretrained(str(tmp_path / "export" / "checkpoint-8"), weights)
        assert differences(network.state_dict(), exported.state_dict()) == []
    capsys.readouterr()
    assert run("trainer.max_duration=9ba", *DEEP) == 2
    assert "alignment: got None, expected sra, the value of the run in" in capsys.readouterr().err
    assert run("trainer.max_duration=9ba", *ALIGNED, "alignment.weight=0.3") == 2
    assert "alignment.weight: got 0.3, expected None, the value of the run in" in capsys.readouterr().err


def test_a_run_without_alignment_is_not_resumed_with_one(run, capsys):
    assert run("trainer.max_duration=1ba", *DEEP) == 0
    assert run("trainer.max_duration=2ba", *ALIGNED) == 2
    assert "alignment: got sra, expected None, the value of the run in" in capsys.readouterr().err
