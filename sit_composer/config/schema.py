"""A run's YAML: every key, its type, its default, its meaning and what it admits.

OmegaConf rejects an unknown key or a wrong type at once. Only light modules are imported: no mistake waits for torch.
"""

import copy
import dataclasses
import typing
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from sit_composer import choices as c
from sit_composer.bounds import Bounds, closest
from sit_composer.errors import UserError

VERSION = 1  # of a config, in YAMLs and in runs' folders


class ConfigError(UserError):
    """A mistake in a run's config or surroundings, told in one line."""


def key(
    doc: str, default: Any = MISSING, bounds: Bounds | None = None, choices: Collection[str | None] | None = None
) -> Any:
    """A config key: its meaning in one line, its default, and what its value, or each value of its list, must be."""
    metadata = {"doc": doc, "bounds": bounds, "choices": choices}
    return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)


@dataclass
class ModelConfig:
    name: str | None = key("hidden_size, depth, num_heads, patch_size and options in one", None, choices=c.VARIANTS)
    input_size: int = key("side of a latent (or of an image, without an autoencoder)", 32, c.COUNT)
    in_channels: int = key("channels of a latent (or of an image)", 4, c.COUNT)
    num_classes: int = key("labels are 0 to num_classes - 1", 1000, c.COUNT)
    class_dropout_prob: float = key("probability of dropping a label; 0: no guidance", 0.1, c.BELOW_ONE)
    learn_sigma: bool | None = key("keep the release's unused second half of the output channels; null: name's", None)
    hidden_size: int | None = key("width of the transformer; null: name's", None, c.COUNT)
    depth: int | None = key("number of blocks; null: name's", None, c.COUNT)
    num_heads: int | None = key("attention heads; null: name's", None, c.COUNT)
    patch_size: int | None = key("side of a token's patch; null: name's", None, c.COUNT)
    mlp_ratio: float = key("width of a block's MLP, divided by hidden_size", 4.0, c.POSITIVE)
    qk_norm: bool | None = key("normalize each head's queries and keys; null: name's", None)
    rms_norm: bool | None = key("RMSNorm for every layer norm; null: name's", None)
    swiglu: bool | None = key("SwiGLU for the MLP, with as many parameters; null: name's", None)
    rotary: bool | None = key("rotate queries and keys by their positions; null: name's", None)
    class_tokens: int = key("tokens of the label that join those of the image", 0, c.FROM_ZERO)
    class_tokens_start: int = key("the block, from 0, that they join at", 0, c.FROM_ZERO)
    shared_adaln: bool = key("one modulation for all blocks, and an offset in each", False)


@dataclass
class TransportConfig:
    path_type: str = key("path between noise and data", "Linear", choices=c.PATHS)
    prediction: str = key("what the network predicts", "velocity", choices=c.PREDICTIONS)
    loss_weight: str | None = key("weight of the loss over time", None, choices=c.LOSS_WEIGHTS)
    train_eps: float | None = key("distance of training times from 0 and 1; null: as the path needs", None, c.EPS)
    sample_eps: float | None = key("distance of sampling times from 0 and 1; null: as the path needs", None, c.EPS)
    time_sampling: str = key("distribution of training times", "uniform", choices=c.TIME_SAMPLINGS)
    time_mean: float = key("logit-normal's mean; above 0: more times near the data", 0.0, c.FINITE)
    time_std: float = key("logit-normal's standard deviation", 1.0, c.POSITIVE)
    time_shift: float | str = key(
        "above 1: more training times near the noise; auto: √(dimensions / 4096), and in sampling too", 1.0, c.SHIFT
    )
    t_eps: float = key("least σ by which an x prediction is divided", 0.05, c.T_EPS)


@dataclass
class AutoencoderConfig:
    name: str | None = key("autoencoder of diffusers by Hub name or path; null: the network works on pixels", None)


@dataclass
class DataConfig:
    local: str = key("folder of the shards, or of their local copies if remote is given")
    remote: str | None = key("URI of the shards, such as s3://BUCKET/PREFIX; null: they are in local", None)
    global_batch_size: int = key("samples per step, over all ranks", bounds=c.COUNT)
    num_workers: int = key("loader processes per rank", 8, c.FROM_ZERO)
    image_size: int | None = key("side to which images are cropped; null: what the network needs", None, c.COUNT)
    flip: bool = key("mirror a random half of the images in each epoch; eval_data ignores it", True)
    shuffle: bool = key("another order in each epoch; eval_data ignores it", True)
    predownload: int | None = key("samples that a worker fetches ahead; null: streaming's default", None, c.COUNT)
    num_canonical_nodes: int = key("nodes for which samples are ordered; more: each fetches fewer shards", 1, c.COUNT)
    cache_limit: str | None = key("bound of the local copies, such as 100gb; null: none", None)


@dataclass
class OptimizerConfig:
    name: str = key("adamw; or muon: Muon for blocks' matrices, AdamW for the rest", "adamw", choices=c.OPTIMIZERS)
    lr: float = key("learning rate", 1e-4, c.POSITIVE)
    betas: list[float] = key("AdamW's two decay rates", [0.9, 0.999], c.BELOW_ONE)
    eps: float = key("AdamW's epsilon", 1e-8, c.NOT_NEGATIVE)
    weight_decay: float = key("weight decay", 0.0, c.NOT_NEGATIVE)
    momentum: float = key("Muon's momentum", 0.95, c.BELOW_ONE)
    clip_norm: float | None = key("norm to which all gradients together are clipped; null: none", None, c.POSITIVE)


@dataclass
class EMAConfig:
    decay: float | None = key("decay of the average per batch; null: 0.9999, none beside others", None, c.INSIDE_UNIT)
    decays: list[float] = key("decays of more averages", [], c.INSIDE_UNIT)
    power: list[float] = key("relative stds of power functions' averages, such as [0.05, 0.1]", [], c.POWER_STD)


@dataclass
class AlignmentConfig:
    name: str = key("the teacher; sra: the averaged network; repa: a vision transformer", choices=c.ALIGNMENTS)
    block: int = key("the block, from 1, whose tokens are aligned with the teacher's", 8, c.COUNT)
    weight: float | None = key("weight of the alignment; null: as published, 0.2 (sra), 0.5 (repa)", None, c.POSITIVE)
    teacher_block: int = key("sra: the averaged network's block, from 1", 20, c.COUNT)
    time_offset: float = key("sra: the most by which the teacher's time is nearer to the data", 0.2, c.UNIT)
    teacher: str | None = key(
        "repa: timm:NAME or transformers:NAME, or a folder there; for shards of latents, the one in their spec.json",
        None,
    )
    projector: str = key("repa: REPA's mlp, or iREPA's conv", "mlp", choices=c.PROJECTORS)
    spatial_norm: float | None = key("repa: iREPA's γ, the part of the mean that is removed; null: off", None, c.UNIT)


@dataclass
class FSDPConfig:
    data_parallel_replicate_degree: int = key("copies of the sharded weights (HSDP), such as one per node", 1, c.COUNT)
    reshard_after_forward: bool = key("free gathered weights between forward and backward pass", True)
    activation_checkpointing: bool = key("keep only the blocks' inputs, and recompute them in the backward pass", False)
    activation_cpu_offload: bool = key("keep the blocks' activations in the CPU's memory", False)
    state_dict_type: str = key("checkpoints: sharded, or full in one file", "sharded", choices=("sharded", "full"))
    mixed_precision: str = key("Composer's setting", "DEFAULT", choices=("DEFAULT", "PURE", "FULL"))
    verbose: bool = key("log what is sharded", False)


@dataclass
class DrawingConfig:
    interval: str = key("time between two generations, such as 10000ba", "10000ba")
    cfg_scale: float = key("guidance; 1 is none", 1.0, c.NOT_NEGATIVE)
    sampling_method: str = key("ODE solver; with fsdp a fixed-step one", "heun", choices=c.ODE_METHODS)
    num_steps: int = key("time points of the solver", 25, c.TIME_POINTS)
    seed: int = key("seed of the images' noise", 0, c.FROM_ZERO)
    batch_size: int = key("images per batch on each rank", 64, c.COUNT)


@dataclass
class SampleGridConfig(DrawingConfig):
    cfg_scale: float = key("guidance; 1 is none", 1.5, c.NOT_NEGATIVE)
    labels: list[int] | None = key("labels of the images; null: ten, evenly over the classes", None, c.FROM_ZERO)
    per_class: int = key("images per label", 4, c.COUNT)


@dataclass
class FrechetConfig(DrawingConfig):
    num_images: int = key("images to generate, the same number per class", 5000, Bounds(2, whole=True))
    reference: str = key("statistics of real images: a file of evaluate --save-statistics, or ADM's npz")
    features: str = key("inception, dinov2, dinov2:FILE or a TorchScript file, as for evaluate", "inception")


@dataclass
class LossByTimeConfig:
    interval: str = key("time between two values, such as 100ba", "100ba")
    bins: int = key("equal parts of the time from 0 to 1", 10, c.COUNT)


@dataclass
class SupervisionConfig:
    heartbeat: float = key("seconds between two heartbeats beside the checkpoints", 15.0, c.POSITIVE)
    patience: float = key("seconds for which a failing upload of a checkpoint is retried", 900.0, c.POSITIVE)
    grace: float = key("seconds that saving after a SIGTERM may take", 25.0, c.POSITIVE)


@dataclass
class Config:
    run_name: str = key("name of the run; the same name resumes it")
    seed: int = key("seed of weights, noise and data order", 0, c.TORCH_SEED)
    model: ModelConfig = key("the network", ModelConfig())
    transport: TransportConfig = key("the path between noise and data, and the objective", TransportConfig())
    autoencoder: AutoencoderConfig = key("the autoencoder between images and latents", AutoencoderConfig())
    data: DataConfig = key("the training data", DataConfig())
    eval_data: DataConfig | None = key("the evaluation data, with data's keys; null: no evaluation", None)
    init_from: str | None = key("weights to start from: a checkpoint, or a model on the Hub; null: new ones", None)
    init_weights: str = key("init_from's weights: ema, training, or one of several averages, as ema:0.999", "ema")
    freeze: list[str] = key("weights that are not trained, by patterns of their names, such as [blocks.0.*]", [])
    optimizer: OptimizerConfig = key("AdamW, or Muon", OptimizerConfig())
    scheduler: dict[str, Any] = key("one of Composer's schedulers: {name: arguments}; none: a constant rate", {})
    ema: EMAConfig | None = key("averaged weights; null: none", EMAConfig())
    alignment: AlignmentConfig | None = key("a second loss, of tokens towards a teacher's; null: none", None)
    sample_grid: SampleGridConfig | None = key("images generated during training; null: none", None)
    frechet: FrechetConfig | None = key("Fréchet distance (FID) during training; null: none", None)
    loss_by_time: LossByTimeConfig | None = key("mean loss in bins of time; {} uses its defaults, null: none", None)
    report: bool = key("write the page of sit_composer.report beside the checkpoints at each save", False)
    precision: str = key("precision of the network", "fp32", choices=(*c.PRECISIONS, *c.GPU_PRECISIONS))
    compile: str = key("torch.compile of each block: false, true, or a backend's name", "false")
    fsdp: FSDPConfig | None = key("sharded training (FSDP2); {} uses its defaults, null is DDP", None)
    supervision: SupervisionConfig = key("what keeps a run alive, and the only one of its name", SupervisionConfig())
    on_nan: str = key(
        "for a loss or gradient that is not finite: stop; skip the step; or rollback to the last checkpoint's weights",
        "stop",
        choices=c.ON_NAN,
    )
    on_nan_limit: int = key("steps skipped in a row, or rollbacks in all, before the run stops", 10, c.COUNT)
    trust_checkpoint: bool = key("unpickle a whole one-file checkpoint, which can run code in it", False)
    trainer: dict[str, Any] = key("arguments of Composer's Trainer, by their names", {})
    version: int = key("format of this file; a newer one is refused", VERSION, Bounds(1, VERSION, whole=True))
    algorithms: dict[str, Any] = key("Composer's algorithms: {name: arguments}", {})
    callbacks: dict[str, Any] = key("Composer's callbacks: {name: arguments}", {})
    loggers: dict[str, Any] = key("Composer's loggers: {name: arguments}", {})


def network_arguments(model: ModelConfig) -> dict[str, Any]:
    """The arguments of `SiT` for a model section: its own values, and the variant's for those that are null.

    Options of blocks that are off are left out, as in the records of earlier versions.
    """
    arguments = {name: value for name, value in vars(model).items() if name != "name"}
    named = {"learn_sigma": True, **c.BLOCKS, **(c.variant(model.name) if model.name is not None else {})}
    found = {name: named.get(name) if value is None else value for name, value in arguments.items()}
    return {name: value for name, value in found.items() if name not in c.BLOCKS or value != c.BLOCKS[name]}


def averages(config: Config) -> list[str]:
    """The names of a run's averages: a decay, or power and a relative std. The first is used during training."""
    if config.ema is None:
        return []
    given = [*([] if config.ema.decay is None else [config.ema.decay]), *config.ema.decays]
    return [str(decay) for decay in given] + [f"{c.POWER}{std}" for std in config.ema.power] or ["0.9999"]


def is_plain(averages: list[str]) -> bool:
    """Whether they are one average with a decay, or none, as in the checkpoints and records of earlier versions."""
    return len(averages) < 2 and not "".join(averages).startswith(c.POWER)


def transport_arguments(config: Config) -> dict[str, Any]:
    """The arguments of `Transport`: its section's, and for a time shift of auto the dimensions of a sample."""
    dims = config.model.in_channels * config.model.input_size**2
    return {**vars(config.transport), **({"dims": dims} if config.transport.time_shift == "auto" else {})}


def suggest(name: str, known: dict[str, str]) -> str:
    """The end of a message about an unknown name, from {known name: how to write it}: the closest one, or all."""
    close = closest(name, known)
    return f"did you mean {known[close]}?" if close else f"expected {', '.join(known.values()) or 'none'}"


WORDS = {"None": "null", "True": "true", "False": "false"}  # as a YAML writes them


def keys(cls: type) -> Iterator[tuple[type | None, str, str, str, str]]:
    """Of each key of a section: its own section's class, if any, its name, default, meaning and expected values."""
    for f in dataclasses.fields(cls):
        default, choices = f.default_factory(), f.metadata["choices"]  # type: ignore[operator]
        shown = "{…}" if dataclasses.is_dataclass(default) else WORDS.get(str(default), str(default))
        expected = ", ".join(WORDS.get(str(choice), str(choice)) for choice in choices or ())
        types = (f.type, *typing.get_args(f.type)) if f.name != "eval_data" else ()  # its keys are data's
        section = next((t for t in types if isinstance(t, type) and dataclasses.is_dataclass(t)), None)
        yield section, f.name, shown, f.metadata["doc"], expected or str(f.metadata["bounds"] or "")


def documentation(cls: type = Config, prefix: str = "") -> str:
    """A line for each key, the sections' keys included."""
    lines = []
    for section, name, default, doc, expected in keys(cls):
        if section is None or default == "null":
            lines.append(f"  {prefix + name:<28} {doc}{expected and f' ({expected})'} [{default}]")
        if section is not None:
            lines.append(documentation(section, f"{prefix}{name}."))
    return "\n".join(lines)
