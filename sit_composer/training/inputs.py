"""What the shards of a config hold, and whether they fit it and each other."""

from sit_composer.config.data_fits import check_data
from sit_composer.config.schema import Config, ConfigError
from sit_composer.data.spec import DataSpec
from sit_composer.data.stream import load_spec

SECTIONS = ("data", "eval_data")


def read_specs(config: Config) -> dict[str, DataSpec]:
    """The spec of each section's shards.

    Raises:
        DataError: naming the file that cannot be read.
    """
    sections = {section: getattr(config, section) for section in SECTIONS}
    return {name: load_spec(data.remote, data.local) for name, data in sections.items() if data is not None}


def check_specs(config: Config, specs: dict[str, DataSpec]) -> None:
    """Checks that the shards fit the config and each other.

    Raises:
        ConfigError: naming the key.
    """
    for section, spec in specs.items():
        check_data(config, spec, section)
    if len(specs) == len(SECTIONS) and specs["eval_data"].classes != specs["data"].classes:
        raise ConfigError("eval_data.local: its classes are not data's, or not in the same order")
