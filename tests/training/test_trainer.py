"""Our Trainer beside Composer's own, and what its steps may not do."""

import copy
import hashlib
import inspect
from collections import Counter

import pytest
import torch
from composer import Callback
from composer import Trainer as ComposerTrainer
from composer.loggers import InMemoryLogger
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from sit_composer import randomness
from sit_composer.algorithms.ema import EMA
from sit_composer.callbacks.progress import Progress
from sit_composer.config.schema import FSDPConfig
from sit_composer.training.model import ComposerSiT
from sit_composer.training.sharding import ShardingConfig, parallelism
from sit_composer.training.trainer import Trainer
from sit_composer.transport import Transport
from tests.helpers import ranks
from tests.helpers.networks import SPEC, batch, small_network


def train(kind, batches=5, fused=True, callbacks=(), loggers=(), load=None, save=None, precision="fp32", fsdp=None):
    """A run of that many batches of 8, in microbatches of 3."""
    columns = batch(40)
    rows = [{name: column[i] for name, column in columns.items()} for i in range(40)]
    model, ema = ComposerSiT(small_network(), Transport(), SPEC, precision=precision), EMA(0.9)
    trained = [p for p in model.parameters() if p.requires_grad]
    trainer = kind(
        model=model, train_dataloader=DataLoader(rows, batch_size=8), max_duration=f"{batches}ba", precision="fp32",
        optimizers=torch.optim.AdamW(trained, lr=1e-3, fused=fused), algorithms=[ema], seed=0, progress_bar=False,
        callbacks=[ema.weights, *callbacks], loggers=list(loggers), device_train_microbatch_size=3, load_path=load,
        save_folder=save, save_interval=f"{batches}ba", parallelism_config=parallelism(fsdp),
    )  # fmt: skip
    trainer.fit()
    return trainer


def bits(trainer):
    optimizer = trainer.state.optimizers[0]
    moments = [tensor for p in optimizer.param_groups[0]["params"] for tensor in optimizer.state[p].values()]
    return [*trainer.state.model.state_dict().values(), *trainer.state.algorithms[0].weights.params.values(), *moments]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))


def test_its_steps_and_what_is_logged_are_composers_to_the_bit():
    logs = InMemoryLogger(), InMemoryLogger()
    whole, ours = (train(kind, loggers=[log]) for kind, log in zip((ComposerTrainer, Trainer), logs, strict=True))
    assert same(whole, ours)
    theirs, logged = (dict(log.data) for log in logs)
    assert theirs.keys() == logged.keys()
    for name in ("loss/train/total", "time/sample", "time/batch", "trainer/device_train_microbatch_size"):
        assert [value for _, value in logged[name]] == [value for _, value in theirs[name]], name
        assert [int(when.batch) for when, _ in logged[name]] == [int(when.batch) for when, _ in theirs[name]], name
    assert type(logged["loss/train/total"][0][1]) is float
    assert ours.state.timestamp.sample == whole.state.timestamp.sample == 40


@pytest.mark.parametrize(("precision", "batches", "rel"), [("fp32", 20, 1e-5), ("bf16", 100, 1e-2)])
def test_losses_are_those_of_the_loop_that_one_writes_first(precision, batches, rel):
    """As in the authors' train.py: AdamW of one tensor after another, in float32; tests/benchmarks/step.py runs it."""
    log = InMemoryLogger()
    trainer = train(Trainer, batches, loggers=[log], precision=precision)
    network, losses = small_network(), []
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, foreach=False)
    average = copy.deepcopy(network)
    columns = batch(40)
    for i in range(batches):
        rows = {name: column[i % 5 * 8 :][:8] for name, column in columns.items()}
        keys, (mean, std) = rows["key"], rows["moments"].float().chunk(2, 1)
        noise, x0 = (randomness.normal(keys, purpose, (4, 8, 8)) for purpose in (randomness.POSTERIOR, randomness.X0))
        t, dropped = randomness.uniform(keys, randomness.TIME), randomness.uniform(keys, randomness.DROP) < 0.1
        x1, te = (mean + std * noise - SPEC.shift) * SPEC.scale, t[:, None, None, None]
        labels = torch.where(dropped, network.num_classes, rows["label"])
        network.y_embedder.dropout_prob = 0
        out = network(te * x1 + (1 - te) * x0, t, labels)
        loss = (out - (x1 - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for kept, p in zip(average.parameters(), network.parameters(), strict=True):
            kept.data.mul_(0.9).add_(p.data, alpha=0.1)
        losses.append(loss.item())
    assert [value for _, value in log.data["loss/train/total"]] == pytest.approx(losses, rel=rel)
    averages = trainer.state.algorithms[0].weights.params
    if precision == "fp32":
        for name, kept in average.named_parameters():
            if kept.requires_grad:
                torch.testing.assert_close(averages[f"network.{name}"], kept, rtol=1e-4, atol=1e-4)


class Refuse(TorchDispatchMode):
    """Refuses what waits for a device: to read a number, or shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"):
            raise AssertionError(f"the step waits for the device: {func}")
        return func(*args, **(kwargs or {}))


class Watch(Callback):
    """Refuses that from the end of the first batch to that of the last one."""

    def __init__(self):
        self.refuse = Refuse()

    def batch_end(self, state, logger):
        if int(state.timestamp.batch) == 1:
            self.refuse.__enter__()
        if int(state.timestamp.batch) == 5:
            self.refuse.__exit__(None, None, None)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_step_waits_for_the_device(precision):
    progress = Progress(5, None, None, False, None)
    trainer = train(Trainer, callbacks=[Watch(), progress], precision=precision)
    assert progress.loss() == pytest.approx(float(trainer.state.total_loss_dict["loss/train/total"]), rel=0.2)


def test_composers_own_steps_do_wait():
    watch = Watch()
    with pytest.raises(AssertionError, match="waits for the device"):
        train(ComposerTrainer, callbacks=[watch])
    watch.refuse.__exit__(None, None, None)  # taken off the stack alone, it would still keep torch.compile off


class Count(TorchDispatchMode):
    """Counts the collectives of tensors, and not those of one number, by their names."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        sizes = [tensor.numel() for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)]
        if func.namespace == "c10d" and max(sizes) > 1:
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_copies_of_shards_are_reduced_once_per_step(monkeypatch):
    """HSDP, as two copies of a shard are, over groups of one rank: these call the same collectives."""
    ranks.work_around(monkeypatch.setattr)
    monkeypatch.setattr(ShardingConfig, "data_parallel_replicate_degree", 1)
    with Count() as count:
        train(Trainer, batches=1, fsdp=FSDPConfig())
    assert count.calls["allreduce_"] == 3  # two blocks and the rest, and not these in each of three microbatches


@pytest.mark.parametrize(("began", "now"), [(None, True), (True, None)])
def test_a_run_goes_on_with_the_optimizer_that_it_began_with(began, now, tmp_path):
    whole = train(Trainer, 10, began)
    train(Trainer, 5, began, save=str(tmp_path))  # to an epoch's end
    resumed = train(Trainer, 10, now, load=str(tmp_path / "latest-rank0.pt"))
    assert resumed.state.optimizers[0].param_groups[0]["fused"] is began
    assert same(whole, resumed)


def test_what_it_replaces_is_what_it_was_written_for():
    """If this fails, a new Composer has other steps: compare them with ours, then set the new hash."""
    names = ("_iter_dataloader", "_use_closures", "_train_batch", "_train_microbatches", "_train_microbatch")
    names += ("_train_loop", "_accumulate_time_across_ranks")
    source = "".join(inspect.getsource(getattr(ComposerTrainer, name)) for name in names)
    assert hashlib.sha256(source.encode()).hexdigest()[:16] == "4eac918c4a3581b0"
