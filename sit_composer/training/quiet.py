"""Silences what libraries say of each run and what means nothing here, each by name; all other warnings stay."""

import warnings

from composer.loggers import TensorboardLogger

MEANINGLESS = (
    "Cannot split tensor of length",  # Composer: the last batch of an evaluation is smaller than the others
    "Specifying `eval_interval=.*` without an `eval_dataloader`",  # Composer: a YAML may be run without its eval_data
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

    TensorboardLogger._initialize_summary_writer = start_once
