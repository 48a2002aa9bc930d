"""What a config says for the ranks that a launcher has started. Torch is not imported."""

import os

from sit_composer.config.schema import Config, ConfigError


def microbatch(config: Config) -> int | str:
    """The samples that a rank trains at a time, or auto."""
    given = config.trainer.get("device_train_microbatch_size")
    return given or config.data.global_batch_size // int(os.environ.get("WORLD_SIZE", 1))


def save_folder(config: Config) -> str:
    """trainer.save_folder, with the names that Composer puts into it. Composer itself would need a process group."""
    folder = str(config.trainer["save_folder"])
    ids = {"run_name": config.run_name, "rank": 0, "local_rank": 0, "node_rank": 0}
    ids |= {name: os.environ.get(name.upper(), 1) for name in ("world_size", "local_world_size")}
    try:
        return folder.format(**ids)
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(f"trainer.save_folder: got {folder!r}, expected names of {', '.join(ids)}: {error}") from None
