import copy
import os
import subprocess
import sys

import pytest
import torch
from composer import Trainer
from torch.utils.data import DataLoader

from sit_composer.algorithms.ema import EMA
from sit_composer.callbacks.run_record import RunRecord
from sit_composer.checkpoint.load import load_checkpoint
from sit_composer.checkpoint.record import NoSuchWeights, Record
from sit_composer.costs.live_bytes import Ledger
from sit_composer.training.model import ComposerSiT
from sit_composer.transport import Transport
from tests.helpers.averages import DECAY, History, closed_form, power_function
from tests.helpers.networks import SPEC, batch, small_network
from tests.helpers.paths import ROOT

SEVERAL = (DECAY, 0.5, "power0.1")


def trainer_of(tmp_path=None, averages=(DECAY,), **arguments) -> tuple[Trainer, EMA, History]:
    data = batch(32)
    samples = [{name: column[i] for name, column in data.items()} for i in range(32)]
    model = ComposerSiT(small_network(), Transport(), SPEC)
    ema, history = EMA(*averages), History()
    names = None if averages == (DECAY,) else ema.names
    record = Record(model={}, transport={}, autoencoder=SPEC, classes=[""] * 1000, averages=names)
    trainer = Trainer(
        model=model, train_dataloader=DataLoader(samples, batch_size=8), eval_dataloader=DataLoader(samples, 8),
        optimizers=torch.optim.AdamW(model.network.parameters(), lr=1e-2), algorithms=[ema], seed=0,
        callbacks=[ema.weights, history, RunRecord(record)], progress_bar=False, precision="fp32",
        **{"max_duration": "6ba", "eval_interval": "1000ba", **arguments},
        **({} if tmp_path is None else {"save_folder": str(tmp_path), "save_interval": "3ba"}),
    )  # fmt: skip
    return trainer, ema, history


def test_the_average_is_the_closed_form_from_the_initial_weights():
    trainer, ema, history = trainer_of()
    trainer.fit()
    expected = closed_form(history)
    assert ema.weights.params.keys() == expected.keys()
    assert not any("pos_embed" in name for name in expected)  # frozen
    for name, average in ema.weights.params.items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(average, history.weights[-1][name])


def test_each_of_several_averages_is_its_closed_form(tmp_path):
    trainer, ema, history = trainer_of(tmp_path, SEVERAL)
    trainer.fit()
    forms = {"0.9": closed_form(history), "0.5": closed_form(history, 0.5), "power0.1": power_function(history, 0.1)}
    assert list(ema.weights.averages) == list(forms)
    for average, form in forms.items():
        checkpoint = load_checkpoint(str(tmp_path), f"ema:{average}")
        assert checkpoint.which == f"ema:{average}"
        for name, expected in form.items():
            found = ema.weights.averages[average][name]
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
            assert torch.equal(checkpoint.weights[name.removeprefix("network.")], found)
    first = load_checkpoint(str(tmp_path))  # as "ema"
    assert first.which == "ema:0.9"
    assert torch.equal(first.weights["x_embedder.proj.weight"], ema.weights.params["network.x_embedder.proj.weight"])
    with pytest.raises(
        NoSuchWeights, match=r"no average 0\.7, expected .* ema:0\.9, ema:0\.5, ema:power0\.1, training"
    ):
        load_checkpoint(str(tmp_path), "ema:0.7")


def test_evaluation_uses_the_first_of_several_averages():
    trainer, ema, _ = trainer_of(averages=SEVERAL)
    trainer.fit()
    held = copy.deepcopy(ema.weights.averages)
    with ema.weights.in_model():
        for name, p in trainer.state.model.named_parameters():
            assert not p.requires_grad or torch.equal(p, held["0.9"][name])
    for average, params in held.items():
        assert all(torch.equal(p, ema.weights.averages[average][name]) for name, p in params.items())


def test_one_average_with_a_decay_is_stored_as_ever_and_others_by_name():
    for averages, stored in (((0.9,), "params"), (("power0.1",), "averages"), (SEVERAL, "averages")):
        _, ema, _ = trainer_of(averages=averages)
        assert list(ema.weights.state_dict()) == [stored]
    assert trainer_of(averages=(0.9,))[1].state_dict() == {"repr": "EMA(decay=0.9)"}


@pytest.mark.parametrize(
    ("ours", "theirs", "got"),
    [
        (SEVERAL, (DECAY,), "one exponential average"),
        (("power0.1",), (DECAY,), "one exponential average"),
        ((DECAY,), ("power0.1",), "power0.1"),
        (SEVERAL, (0.5, "power0.1"), "0.5, power0.1"),
    ],
)
def test_other_averages_are_refused(ours, theirs, got):
    state = trainer_of(averages=theirs)[1].weights.state_dict()
    with pytest.raises(
        ValueError, match=f"ema: got {', '.join(map(str, ours))}, expected the checkpoint's averages: {got}"
    ):
        trainer_of(averages=ours)[1].weights.load_state_dict(state)


def test_after_training_the_model_holds_the_training_weights(tmp_path):
    trainer, ema, history = trainer_of(tmp_path)
    trainer.fit()
    for name, p in trainer.state.model.named_parameters():
        if p.requires_grad:
            assert torch.equal(p, history.weights[-1][name])
    training = load_checkpoint(str(tmp_path), "training").weights
    average = load_checkpoint(str(tmp_path), "ema").weights
    for name, value in history.weights[-1].items():
        name = name.removeprefix("network.")
        assert torch.equal(training[name], value)
        assert torch.equal(average[name], ema.weights.params[f"network.{name}"])
    assert torch.equal(average["pos_embed"], training["pos_embed"])


def test_evaluation_uses_the_average_and_gives_the_weights_back():
    trainer, ema, _ = trainer_of()
    trainer.fit()
    before = copy.deepcopy(trainer.state.model.state_dict())
    trainer.eval()
    measured = trainer.state.eval_metrics["eval"]["loss"].compute()
    assert all(torch.equal(v, before[k]) for k, v in trainer.state.model.state_dict().items())
    model = trainer.state.model.eval()
    data = batch(32)
    with torch.no_grad():
        with_training = model.eval_forward(data).mean()
        with ema.weights.in_model():
            with_average = model.eval_forward(data).mean()
    assert measured.item() == pytest.approx(with_average.item(), rel=1e-5)
    assert with_average.item() != pytest.approx(with_training.item(), rel=1e-3)


@pytest.mark.parametrize("averages", [(DECAY,), SEVERAL])
def test_a_resumed_average_goes_on_to_the_bit(tmp_path, averages):
    whole, ema, _ = trainer_of(averages=averages)
    whole.fit()
    # An epoch's end, where Composer restores the random state.
    first, _, _ = trainer_of(tmp_path, averages, max_duration="4ba")
    first.fit()
    second, resumed, _ = trainer_of(tmp_path / "again", averages, load_path=str(tmp_path / "latest-rank0.pt"))
    second.fit()
    for average, params in ema.weights.averages.items():
        for name, value in params.items():
            assert torch.equal(resumed.weights.averages[average][name], value)
    for name, p in whole.state.model.state_dict().items():
        assert torch.equal(second.state.model.state_dict()[name], p)


def test_weights_alone_are_the_training_weights_and_start_a_new_average(tmp_path):
    first, ema, history = trainer_of(tmp_path)
    first.fit()
    latest = str(tmp_path / "latest-rank0.pt")
    _, fresh, _ = trainer_of(tmp_path / "again", load_path=latest, load_weights_only=True)
    for name, weight in history.weights[-1].items():
        assert torch.equal(fresh.weights.params[name], weight)
        assert not torch.equal(ema.weights.params[name], weight)


def test_an_average_of_another_model_is_refused():
    _, ema, _ = trainer_of()
    with pytest.raises(ValueError, match="EMA is of another model"):
        ema.weights.load_state_dict({"params": {"network.other": torch.zeros(1)}})


@pytest.mark.slow
def test_two_ranks_hold_the_same_average_and_it_is_the_closed_form():
    composer = os.path.join(os.path.dirname(sys.executable), "composer")
    command = [composer, "-n", "2", "-m", "tests.helpers.ddp_ema"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "both ranks agree to the bit on" in done.stdout


def test_an_exchange_restores_every_bit_and_holds_no_second_copy():
    trainer, ema, _ = trainer_of()
    weights = [p for p in trainer.state.model.parameters() if p.requires_grad]
    for p in weights:
        p.data.add_(1)  # so that they differ from the averages
    tensors = [*weights, *ema.weights.params.values()]
    before, places = [tensor.detach().clone() for tensor in tensors], [tensor.data_ptr() for tensor in tensors]
    with Ledger(list(map(torch.detach, tensors))) as ledger:
        ema.weights.swap()
    largest, whole = max(p.nbytes for p in weights), sum(p.nbytes for p in weights)
    assert max(ledger.history) <= 2 * largest < whole  # one copy is freed when the next one is made
    crossed = before[len(weights) :] + before[: len(weights)]
    assert all(torch.equal(tensor, known) for tensor, known in zip(tensors, crossed, strict=True))
    ema.weights.swap()
    assert all(torch.equal(tensor, known) for tensor, known in zip(tensors, before, strict=True))
    assert [tensor.data_ptr() for tensor in tensors] == places  # which a compiled graph may hold on to
