"""A run's inputs: the shards' specs, checked against the config; what turns samples into latents; and the loaders."""

from dataclasses import dataclass, replace

from composer.utils import dist

from sit_composer.autoencoder import AutoencoderSpec, DiffusersAutoencoder
from sit_composer.choices import teacher_name
from sit_composer.config.data_fits import check_classes_agree, check_data, check_latents, token_grid
from sit_composer.config.schema import Config, ConfigError
from sit_composer.data.loader import SitLoader, build_loader
from sit_composer.data.spec import DataSpec
from sit_composer.data.stream import load_spec
from sit_composer.errors import UserError
from sit_composer.precision import DTYPES
from sit_composer.teacher import Teacher

SECTIONS = ("data", "eval_data")
Specs = dict[str, DataSpec]  # by section


@dataclass(frozen=True)
class Inputs:
    """A run's inputs. The dicts have an entry per section: ``data``, ``eval_data``."""

    specs: Specs
    autoencoder: AutoencoderSpec  # of the latents that the network learns
    encoder: DiffusersAutoencoder | None  # encodes images in each step; None if the shards hold latents, or for pixels
    loaders: dict[str, SitLoader]
    teacher: Teacher | None = None  # computes features of images in each step, for REPA; None if the shards hold them


def read_specs(config: Config) -> Specs:
    """Reads `spec.json` once for each section of data that the config has."""
    sections = {name: getattr(config, name) for name in SECTIONS}
    return {name: load_spec(data.remote, data.local) for name, data in sections.items() if data is not None}


def check_specs(config: Config, specs: Specs) -> None:
    """Raises ConfigError unless the network can be trained on ``data``'s shards, and evaluated on ``eval_data``'s."""
    if "data" in specs:
        check_classes_agree(specs)
    latents: list[AutoencoderSpec] = []
    for section, spec in specs.items():
        check_data(config, spec, section)
        if spec.kind == "latents":
            # check_data compares the autoencoders' names, and one autoencoder's may be spelled in two ways.
            theirs = AutoencoderSpec(**{**spec.autoencoder, "name": config.autoencoder.name})
            check_latents(config, theirs.channels, theirs.downsample, spec.image_size, section)
            latents.append(theirs)
            if theirs != latents[0]:
                raise ConfigError(f"{section}.local: got latents of {theirs}, expected data's, of {latents[0]}")


def open_inputs(config: Config, device: str) -> Inputs:
    """Reads and checks the specs, loads the encoder if images are to be encoded, and builds the loaders."""
    specs = read_specs(config)
    check_specs(config, specs)
    autoencoder, encoder = open_autoencoder(config, specs, device)
    teacher = open_teacher(config, specs, device)
    aligned = config.alignment is not None and config.alignment.name == "repa"
    loaders = {}
    for section, spec in specs.items():
        data, training = getattr(config, section), section == "data"
        image_size = None  # latents have theirs
        if spec.kind == "pixels":
            image_size = data.image_size or config.model.input_size * autoencoder.downsample
            check_latents(config, autoencoder.channels, autoencoder.downsample, image_size, section)
            if encoder is not None:
                if fault := encoder.layout.size_fault(image_size):
                    raise ConfigError(f"{section}.image_size: {fault}")
                spec = replace(spec, channels=encoder.picture_channels)  # as images are decoded for it
        loaders[section] = build_loader(
            data.remote,
            data.local,
            spec=spec,
            batch_size=data.global_batch_size // dist.get_world_size(),
            image_size=image_size,
            flip=data.flip and training,
            shuffle=data.shuffle and training,
            seed=config.seed,
            num_workers=data.num_workers,
            drop_last=training,
            predownload=data.predownload,
            cache_limit=data.cache_limit,
            # Streaming's default is the number of nodes that a run starts on, so another order on every cluster.
            num_canonical_nodes=data.num_canonical_nodes,
            features=aligned and training and teacher is None,
        )
    return Inputs(specs, autoencoder, encoder, loaders, teacher)


def open_teacher(config: Config, specs: Specs, device: str) -> Teacher | None:
    """REPA's teacher, loaded, if images are at hand in each step."""
    alignment = config.alignment
    if alignment is None or alignment.name != "repa" or specs["data"].kind != "pixels":
        return None
    try:
        return Teacher(teacher_name(alignment.teacher), token_grid(config), device, DTYPES[config.precision])
    except UserError as error:
        raise ConfigError(f"alignment.teacher: {error}") from error


def open_autoencoder(config: Config, specs: Specs, device: str) -> tuple[AutoencoderSpec, DiffusersAutoencoder | None]:
    """The autoencoder of the run's latents, and the loaded one if images are encoded in each step."""
    latents = {name: AutoencoderSpec(**spec.autoencoder) for name, spec in specs.items() if spec.kind == "latents"}
    if config.autoencoder.name is None:
        return AutoencoderSpec(name=None, channels=specs["data"].channels), None
    if len(latents) == len(specs):
        return latents["data"], None
    # The network learns what data are: images of eval_data are standardized as its latents, and never the reverse.
    encoder = DiffusersAutoencoder(config.autoencoder.name, device, latents=latents.get("data"))
    for section, got in latents.items():
        if got != encoder.spec:
            raise ConfigError(f"{section}.local: got latents of {got}, expected {encoder.spec}, as images are encoded")
    return encoder.spec, encoder
