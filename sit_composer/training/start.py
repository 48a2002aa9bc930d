"""Starts a new run from weights: ``init_from``."""

import torch
from composer.utils import dist

from sit_composer.checkpoint.load import fetch, forget_download, load_checkpoint
from sit_composer.checkpoint.record import Checkpoint, Record
from sit_composer.checkpoint.start import compare, transfer
from sit_composer.cli import say
from sit_composer.config.schema import Config, ConfigError
from sit_composer.errors import UserError
from sit_composer.sit import SiT
from sit_composer.supervision.supervisor import from_rank_0
from sit_composer.training.summary import as_text


def start_from(config: Config, record: Record, network: SiT, device: str) -> None:
    """Fills the network with the weights of ``init_from``, which rank 0 reads and sends to all, and prints what is new.

    Raises ConfigError if they don't fit.
    """

    def read() -> list[str]:
        checkpoint, lines = read_weights(config, record)
        transfer(checkpoint, record, network)
        forget_download(checkpoint)
        return lines

    for line in from_rank_0(read):
        say(line)
    if dist.get_world_size() > 1:
        place = torch.device("cuda", dist.get_local_rank()) if device == "cuda" else torch.device("cpu")
        for tensor in network.state_dict().values():
            shared = tensor.to(place)
            dist.broadcast(shared, 0)
            tensor.copy_(shared)


def read_weights(config: Config, record: Record) -> tuple[Checkpoint, list[str]]:
    """The checkpoint of ``init_from``, and lines that say what becomes of its weights in the network of that record."""
    try:
        checkpoint = load_checkpoint(fetch(config.init_from), config.init_weights)
        found = compare(checkpoint.record, record, config.init_from)
    except UserError as error:
        raise ConfigError(f"init_from: {error}") from error
    trained = f", {checkpoint.step:,} batches" if checkpoint.step else ""
    lines = {"weights": f"{checkpoint.which} of {checkpoint.source}{trained}; the optimizer starts anew", **found}
    return checkpoint, as_text(lines).splitlines()
