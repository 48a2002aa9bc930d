"""Silences what libraries say of each run and what means nothing here, each by name; all other warnings stay."""

import warnings
from functools import partial
from typing import Any

from composer.loggers import TensorboardLogger

MEANINGLESS = (
    "Cannot split tensor of length",  # Composer: the last batch of an evaluation is smaller than the others
    "Specifying `eval_interval=.*` without an `eval_dataloader`",  # Composer: a YAML may be run without its eval_data
    "Guard is not in the state_dict",  # Composer: a checkpoint of an earlier version
    "TypedStorage is deprecated",  # torch.distributed.checkpoint's own use of it
)


def silence() -> None:
    """Silences these warnings, and keeps TensorBoard to one file of events per run."""
    for message in MEANINGLESS:
        warnings.filterwarnings("ignore", message)
    start_writer = TensorboardLogger._initialize_summary_writer

    def start_once(logger: TensorboardLogger) -> None:
        start_writer(logger)
        logger.writer.close = logger.writer.flush  # Composer closes it after each flush, and the next one is a new file
        logger.writer.add_hparams = partial(_add_hparams, logger.writer)

    TensorboardLogger._initialize_summary_writer = start_once


def _add_hparams(writer: Any, hparam_dict: dict, metric_dict: dict, run_name: str) -> None:
    """Writes them to the same file; torch's own makes a new one each time, which Composer does at each evaluation."""
    from torch.utils.tensorboard.summary import hparams  # needs tensorboard

    for summary in hparams(hparam_dict, metric_dict):
        writer.file_writer.add_summary(summary)
