"""Composer's Trainer, without what makes the host wait for the device in each step.

Composer 0.32 reads numbers from the device in each step, and so waits until the device has done all that it was asked:
whether the data have ended, the batch's size, the loss in the optimizer's closure and to log it, samples and seconds.
Here the hosts agree on what they know, and the loss stays a tensor until something shows it.
"""

import itertools
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
from composer import Trainer as ComposerTrainer
from composer.core import Event
from composer.loggers import LoggerDestination
from composer.trainer.trainer import TrainerMode
from composer.utils import dist
from torch import Tensor
from torch.distributed import ReduceOp
from torch.distributed.fsdp import FSDPModule

from sit_composer.callbacks.metrics_log import MetricsLog

Batch = dict[str, Tensor]


class Trainer(ComposerTrainer):
    """Composer's, with a host that only waits for the loss if there are loggers, which log each batch's.

    ``state.total_loss_dict`` holds tensors. ``host_timeout``: how long hosts wait for each other.
    """

    def __init__(self, *args: Any, host_timeout: timedelta | None = None, **kwargs: Any):
        self._host_timeout = host_timeout
        self._hosts: torch.distributed.ProcessGroup | None = None
        super().__init__(*args, **kwargs)
        for scheduler in self.state.schedulers:
            groups = scheduler.optimizer.param_groups
            if len(scheduler.base_lrs) != len(groups):  # from a checkpoint of another optimizer
                scheduler.base_lrs = [group["initial_lr"] for group in groups]

    def log_to(self, logger: LoggerDestination) -> None:
        """Adds a logger that earlier checkpoints know nothing of, once a checkpoint is loaded."""
        self.state.callbacks.append(logger)
        self.logger.destinations = (*self.logger.destinations, logger)

    @cached_property
    def _sharded(self) -> FSDPModule | None:
        """The root of a sharded model."""
        return next((module for module in self.state.model.modules() if isinstance(module, FSDPModule)), None)

    def _sum(self, *numbers: float) -> list[float]:
        """The sums over all ranks of what their hosts know."""
        if dist.get_world_size() == 1:
            return list(numbers)
        if self._hosts is None:
            self._hosts = torch.distributed.new_group(backend="gloo", timeout=self._host_timeout)
        summed = torch.tensor(numbers, dtype=torch.float64)  # whole numbers stay exact
        torch.distributed.all_reduce(summed, ReduceOp.SUM, group=self._hosts)
        return summed.tolist()

    def _iter_dataloader(self, trainer_mode: TrainerMode) -> Iterator[Batch]:
        """The batches, until a rank has no more."""
        training, length = trainer_mode == TrainerMode.TRAIN, self.state.dataloader_len
        batches = itertools.islice(self.state.dataloader, None if length is None else int(length))
        while True:
            if training:
                self.engine.run_event(Event.BEFORE_DATALOADER)
            batch = next(batches, None)
            if batch is None and training:
                self.engine.run_marker_only_event(Event.AFTER_DATALOADER)  # there is no batch to run it
            if self._sum(batch is None)[0]:
                return
            yield batch

    def _use_closures(self) -> bool:
        return False  # AdamW needs none; Composer's returns the loss as a number, before the optimizer's step

    def _train_batch(self, use_grad_scaling: bool) -> None:
        """Composer's step; then logs the loss, if there is a logger, in place of `_train_loop`."""
        losses = super()._train_batch(use_grad_scaling)
        for loss in losses.values():
            dist.all_reduce(loss)
        ranks = dist.get_world_size()
        self.state.total_loss_dict = {name: loss / ranks for name, loss in losses.items()}
        batch = self.state.timestamp.batch.value
        numbers: dict[str, float] = {}  # read once, and only for a logger that needs them at once
        for logger in self.logger.destinations:
            if isinstance(logger, MetricsLog):  # which waits for nothing
                logger.log_metrics(self.state.total_loss_dict, batch)
            else:
                numbers = numbers or {name: loss.item() / ranks for name, loss in losses.items()}
                logger.log_metrics(numbers, batch)

    def _train_microbatches(
        self, microbatches: Sequence[Batch], total_loss_dict: dict[str, Tensor], ddp_sync: bool = True
    ) -> Tensor:
        """Composer's, with the batch's size from the hosts, and the loss added up."""
        state, spec = self.state, self._train_data_spec
        self.engine.run_event(Event.BEFORE_TRAIN_BATCH)
        scaled = self._use_grad_scaling(state.precision, state.scaler)
        for optimizer in state.optimizers:
            optimizer.zero_grad(set_to_none=True)
        samples = self._sum(sum(map(spec.get_num_samples_in_batch, microbatches)))[0] / dist.get_world_size()
        batch = state.batch
        for i, state.batch in enumerate(microbatches):
            state.batch = spec.microbatch_transforms(state.device.batch_to_device(state.batch))
            is_last = i + 1 == len(microbatches)
            if self._sharded is not None:  # HSDP's copies of a shard are reduced once per step, as DDP's gradients are
                self._sharded.set_requires_all_reduce(is_last)
            for name, loss in self._train_microbatch(scaled, samples, is_last).items():
                key = f"loss/train/{name}"
                total_loss_dict[key] = total_loss_dict[key] + loss if key in total_loss_dict else loss
        state.batch = batch
        if scaled:
            for optimizer in state.optimizers:
                state.scaler.unscale_(optimizer)
        state.total_loss_dict = total_loss_dict  # this rank's, for what runs at the event
        self.engine.run_event(Event.AFTER_TRAIN_BATCH)
        return total_loss_dict["loss/train/total"]

    def _accumulate_time_across_ranks(
        self, num_samples: float, num_tokens: int, batch_time: timedelta
    ) -> tuple[int, int, timedelta]:
        """The ranks' samples and tokens, and the first one's seconds."""
        seconds = batch_time.total_seconds() if dist.get_global_rank() == 0 else 0.0
        samples, tokens, seconds = self._sum(num_samples, num_tokens, seconds)
        return int(samples), int(tokens), timedelta(seconds=seconds)
