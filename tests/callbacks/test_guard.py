"""Losses and gradients that are not finite, and clipped gradients: real steps of small networks."""

import math
import re

import pytest
import torch
from composer import Callback
from composer.algorithms import GradientClipping
from composer.loggers import InMemoryLogger
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from sit_composer.algorithms.ema import EMA, local_part
from sit_composer.callbacks import guard as module
from sit_composer.callbacks.guard import Guard, NotFinite
from sit_composer.config.schema import FSDPConfig
from sit_composer.training.model import ComposerSiT
from sit_composer.training.muon import Muon
from sit_composer.training.sharding import parallelism
from sit_composer.training.trainer import Trainer
from sit_composer.transport import Transport
from tests.helpers import ranks
from tests.helpers.networks import SPEC, batch, small_network
from tests.helpers.poison import poison
from tests.helpers.runs import differences

OPTIMIZERS = {
    "fused": lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True),
    "foreach": lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3),
    "muon": lambda model: Muon(model, lr=1e-3, fused=True),
}


class States(Callback):
    """What training changes, after each batch: weights, averages and the optimizer's state."""

    def __init__(self, weights):
        self.weights = weights
        self.states = []

    def batch_checkpoint(self, state, logger):
        optimizer = state.optimizers[0]
        kept = [*state.model.parameters(), *self.weights.params.values()]
        kept += [t for group in optimizer.param_groups for p in group["params"] for t in optimizer.state[p].values()]
        self.states.append([local_part(tensor).clone() for tensor in kept])

    def same(self, one, other):
        return all(map(torch.equal, self.states[one - 1], self.states[other - 1]))


def train(*guards, optimizer="fused", batches=5, fsdp=None, algorithms=(), callbacks=(), loggers=()):
    """A run of that many batches of 8, in microbatches of 3, and its states."""
    columns = batch(40)
    rows = [{name: column[i] for name, column in columns.items()} for i in range(40)]
    model, ema = ComposerSiT(small_network(), Transport(), SPEC), EMA(0.9)
    states = States(ema.weights)
    watch = [Guard(*one, ema.weights, "test") for one in guards]
    trainer = Trainer(
        model=model, train_dataloader=DataLoader(rows, batch_size=8), max_duration=f"{batches}ba", precision="fp32",
        optimizers=OPTIMIZERS[optimizer](model), algorithms=[ema, *algorithms], seed=0, progress_bar=False,
        callbacks=[ema.weights, *watch, states, *callbacks], loggers=list(loggers), device_train_microbatch_size=3,
        parallelism_config=parallelism(fsdp),
    )  # fmt: skip
    trainer.fit()
    return states


class Refuse(TorchDispatchMode, Callback):
    """Refuses to read a number from the device, from the end of the first batch to that of the fourth."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"):
            raise AssertionError(f"the step waits for the device: {func}")
        return func(*args, **(kwargs or {}))

    def batch_start(self, state, logger):
        if int(state.timestamp.batch) == 1:
            self.__enter__()

    def before_dataloader(self, state, logger):
        if int(state.timestamp.batch) == 4:
            self.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("optimizer", "fsdp", "value"),
    [
        ("fused", None, math.inf),
        ("foreach", None, math.nan),
        ("muon", None, math.inf),
        ("fused", FSDPConfig(), math.nan),
    ],
)
def test_a_batch_with_one_number_that_is_not_finite_changes_nothing(monkeypatch, optimizer, fsdp, value, capsys):
    ranks.work_around(monkeypatch.setattr)
    poison({3}, monkeypatch.setattr, value)  # in the last of three microbatches
    states = train(("skip", 10, None), optimizer=optimizer, fsdp=fsdp)
    assert [states.same(i, i + 1) for i in (1, 2, 3, 4)] == [False, True, False, False]
    assert all(tensor.isfinite().all() for tensor in states.states[-1])
    assert capsys.readouterr().out == "test: batch 3 skipped: its loss is not finite (1 in all); see --replay 3\n"


@pytest.mark.parametrize("optimizer", ["fused", "muon"])
def test_a_run_without_such_batches_has_the_same_bits(optimizer):
    plain = train(optimizer=optimizer)
    guarded = train(("skip", 10, None), optimizer=optimizer)
    assert all(map(torch.equal, plain.states[-1], guarded.states[-1]))


@pytest.mark.parametrize("guard", [("stop", 10, None), ("skip", 10, 0.1)])
def test_no_step_waits_for_the_device(monkeypatch, guard):
    if guard[0] == "skip":
        poison({3}, monkeypatch.setattr)
    train(guard, callbacks=[Refuse()])


def test_where_the_optimizer_cannot_skip_on_the_device_the_host_reads_a_number():
    refuse = Refuse()
    with pytest.raises(AssertionError, match="waits for the device"):
        train(("skip", 10, None), optimizer="foreach", callbacks=[refuse])
    refuse.__exit__(None, None, None)


def test_a_gradient_alone_that_is_not_finite_is_skipped_too(monkeypatch, capsys):
    """Of float32's largest numbers, whose squares are infinite."""
    after = Guard.after_train_batch

    def spoilt(self, state, logger):
        if int(state.timestamp.batch) == 2:
            next(p for p in state.model.parameters() if p.grad is not None).grad[0] = -math.inf
        after(self, state, logger)

    monkeypatch.setattr(Guard, "after_train_batch", spoilt)
    assert train(("skip", 10, None)).same(2, 3)
    assert "batch 3 skipped: its gradient is not finite" in capsys.readouterr().out


@pytest.mark.parametrize("fsdp", [None, FSDPConfig()])
def test_clipped_steps_are_torchs_to_the_bit_and_norms_are_logged(monkeypatch, fsdp):
    ranks.work_around(monkeypatch.setattr)
    norms, logs = [], {1: InMemoryLogger(), 2: InMemoryLogger()}

    class Norms(Callback):
        def after_train_batch(self, state, logger):
            gradients = [local_part(p.grad) for p in state.model.parameters() if p.grad is not None]
            norms.append(sum(gradient.double().square().sum() for gradient in gradients).sqrt().item())

    train(fsdp=fsdp, callbacks=[Norms()], batches=1)
    clip = 0.9 * norms[0]
    theirs = train(algorithms=[GradientClipping("norm", clip)], fsdp=fsdp)
    for interval, log in logs.items():
        monkeypatch.setattr(module, "INTERVAL", interval)
        ours = train(("stop", 10, clip), fsdp=fsdp, loggers=[log])
        assert all(map(torch.equal, theirs.states[-1], ours.states[-1]))
    each, means = ({int(when.batch): value for when, value in log.data["gradient/norm"]} for log in logs.values())
    assert each[1] == pytest.approx(norms[0], rel=1e-5)
    assert means == pytest.approx({2: (each[1] + each[2]) / 2, 4: (each[3] + each[4]) / 2, 5: each[5]})
    clipped = {int(when.batch): value for when, value in logs[1].data["gradient/clipped"]}
    assert clipped == {batch: float(norm > clip) for batch, norm in each.items()}
    assert clipped[1] == 1


def test_too_many_in_a_row_stop_the_run(monkeypatch):
    monkeypatch.setattr(module, "INTERVAL", 1)
    poison({2, 4, 5}, monkeypatch.setattr)
    log = InMemoryLogger()
    with pytest.raises(NotFinite, match=r"^test: 2 batches in a row are not finite \(on_nan_limit=1\); no checkpoint"):
        train(("skip", 1, None), loggers=[log])
    assert [value for _, value in log.data["nan/skipped"]] == [0, 1, 1, 2, 3]  # that of the last batch, too


def test_rollbacks_need_a_checkpoint_and_are_bounded(monkeypatch, capsys):
    poison({2, 4}, monkeypatch.setattr)
    with pytest.raises(
        NotFinite, match=r"^test: batch 2: its loss is not finite, and there is no checkpoint to go back"
    ):
        train(("rollback", 1, None))
    monkeypatch.setattr(Guard, "epoch_start", lambda self, *_: setattr(self, "go_back", lambda: "the first"))
    with pytest.raises(NotFinite, match=r"^test: batch 4: its loss is not finite after 1 rollbacks \(on_nan_limit\);"):
        train(("rollback", 1, None))
    assert "batch 2: its loss is not finite; continues with the weights of the first" in capsys.readouterr().out


def test_a_run_that_needs_no_norms_logs_some_of_them(monkeypatch):
    monkeypatch.setattr(module, "NORM_INTERVAL", 2)
    every, some = InMemoryLogger(), InMemoryLogger()
    monkeypatch.setattr(module, "INTERVAL", 1)
    clipped, plain = train(("stop", 10, 1e9), loggers=[every]), train(("stop", 10, None), loggers=[some])
    assert all(map(torch.equal, clipped.states[-1], plain.states[-1]))
    norms = [value for _, value in every.data["gradient/norm"]]
    assert [float(value) for _, value in some.data["gradient/norm"]] == pytest.approx(norms[::2])


def test_a_run_stops_keeps_its_last_good_checkpoint_and_rolls_back_when_told(run, monkeypatch, capsys, tmp_path):
    poison({6}, monkeypatch.setattr)
    options = ["trainer.max_duration=9ba", "trainer.save_interval=4ba"]
    assert run(*options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"error: quickstart: the loss of batch 6 is not finite; .*ep0-ba4-rank0.pt; add --replay 6 .*", error
    )
    assert {path.name for path in (tmp_path / "run").glob("ep*")} == {"ep0-ba4-rank0.pt"}
    # The cause, found from that checkpoint: nothing is saved, and the run's folder stays as it is.
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    assert run(*options, "--replay", "8") == 0
    shown = capsys.readouterr().out
    assert "replays batch 8, from ep0-ba4-rank0.pt" in shown
    assert "batch 6: 64 samples, of which 1 have a loss that is not finite" in shown
    assert re.search(
        r"index +label +time +loss\n +\d+ +\d +0\.\d+ +(inf|nan)\n( +\d+ +\d +0\.\d+ +\d+\.\d+\n){15}", shown
    )
    assert "first output that is not finite: the noised latents (rank 0)\n" in shown
    assert re.search(r"first gradient that is not finite: network\.final_layer\S+; \d+ of \d+ parameters", shown)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before
    # Back to that checkpoint's weights, average and optimizer, and past the batch.
    assert run("trainer.max_duration=6ba", "on_nan=rollback") == 0
    said = "quickstart: batch 6: its loss is not finite; continues with the weights of ep0-ba4-rank0.pt, at batch 7\n"
    assert said in capsys.readouterr().out
    before, after = (torch.load(tmp_path / "run" / f"ep0-ba{n}-rank0.pt", weights_only=False)["state"] for n in (4, 6))
    for state in (before, after):
        state["average"] = state["callbacks"]["EMAWeights"]
    trained = ("model", "optimizers", "average")
    assert differences({name: before[name] for name in trained}, {name: after[name] for name in trained}) == []
    assert after["callbacks"]["Guard"] == {"skipped": 1, "in_a_row": 1, "rollbacks": 1}
    assert after["timestamp"]["Timestamp"]["batch"] == 6


def test_weights_that_are_not_finite_are_never_saved(run, monkeypatch, capsys, tmp_path):
    def spoil(self, state, logger):
        if int(state.timestamp.batch) == 2:
            state.callbacks[0].params["network.x_embedder.proj.weight"][0] = math.nan  # of the average alone

    monkeypatch.setattr(Guard, "batch_start", spoil)
    assert run("trainer.max_duration=4ba", "trainer.save_interval=2ba") == 2
    assert (
        "the weights after batch 4 are not finite; the last checkpoint is ep0-ba2-rank0.pt" in capsys.readouterr().err
    )
    assert {path.name for path in (tmp_path / "run").glob("ep*")} == {"ep0-ba2-rank0.pt"}
