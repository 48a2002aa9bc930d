"""A run's YAML: every key, its type, its default and what it means. `train.py --help` prints this.

The YAML and the command line's ``key=value`` go into OmegaConf structured configs, so that an unknown key or a wrong
type stops a run at once. Only light modules are imported here: a mistake must not wait for torch.
"""

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from sit_composer.choices import variant
from sit_composer.errors import UserError


class ConfigError(UserError):
    """A mistake in a run's config or surroundings, told in one line."""


def key(doc: str, default: Any = MISSING) -> Any:
    """A config key with its one-line documentation."""
    return field(default_factory=lambda: copy.deepcopy(default), metadata={"doc": doc})


@dataclass
class ModelConfig:
    name: str | None = key("SiT-{S,B,L,XL}/{2,4,8}: hidden_size, depth, num_heads and patch_size in one", None)
    input_size: int = key("side of a latent (or of a picture, without an autoencoder)", 32)
    in_channels: int = key("channels of a latent (or of a picture)", 4)
    num_classes: int = key("labels run from 0 to num_classes - 1", 1000)
    class_dropout_prob: float = key("how often a label is dropped, for guidance; 0: no guidance", 0.1)
    learn_sigma: bool = key("keep the release's unused second half of the output channels", True)
    hidden_size: int | None = key("width of the transformer, over name's", None)
    depth: int | None = key("number of blocks, over name's", None)
    num_heads: int | None = key("attention heads, over name's", None)
    patch_size: int | None = key("side of a token's patch, over name's", None)
    mlp_ratio: float = key("width of a block's MLP over hidden_size", 4.0)


@dataclass
class TransportConfig:
    path_type: str = key("Linear, GVP or VP", "Linear")
    prediction: str = key("what the network predicts: velocity, noise or score", "velocity")
    loss_weight: str | None = key("null, velocity or likelihood", None)
    train_eps: float | None = key("distance of training times from 0 and 1; null: as the path needs", None)
    sample_eps: float | None = key("the same for sampling", None)
    time_sampling: str = key("how training times are drawn: uniform or logit-normal", "uniform")
    time_mean: float = key("logit-normal's mean; above 0: nearer to the data", 0.0)
    time_std: float = key("logit-normal's standard deviation", 1.0)
    time_shift: float = key("moves training times towards the noise; 1: not at all", 1.0)


@dataclass
class AutoencoderConfig:
    name: str | None = key("AutoencoderKL by hub name or path; null: the network works on pixels", None)


@dataclass
class DataConfig:
    local: str = key("folder of the shards, or of their local copies if there is a remote")
    remote: str | None = key("s3://, gs://, … URI of the shards; null: they are in local", None)
    global_batch_size: int = key("samples a step, over all ranks")
    num_workers: int = key("loader processes a rank", 8)
    image_size: int | None = key("side to which pictures are cropped; null: what the network needs", None)
    flip: bool = key("mirror half of the pictures, in each epoch others; eval_data never does", True)
    shuffle: bool = key("another order each epoch; eval_data keeps its own", True)
    predownload: int | None = key("samples a worker fetches ahead; null: streaming's own choice", None)
    num_canonical_nodes: int = key("nodes whose order of samples it is; with more, a node fetches fewer shards", 1)
    cache_limit: str | None = key("bound of the local copies, such as 100gb; null: none", None)


@dataclass
class OptimizerConfig:
    lr: float = key("AdamW's learning rate", 1e-4)
    betas: list[float] = key("AdamW's decay rates", [0.9, 0.999])
    eps: float = key("AdamW's epsilon", 1e-8)
    weight_decay: float = key("AdamW's weight decay", 0.0)


@dataclass
class EMAConfig:
    decay: float = key("of the averaged weights, a batch", 0.9999)


@dataclass
class FSDPConfig:
    data_parallel_replicate_degree: int = key("copies of the shards (HSDP), such as one a node", 1)
    reshard_after_forward: bool = key("free gathered weights between forward and backward pass", True)
    activation_checkpointing: bool = key("keep each block's input only, and run it again in the backward pass", False)
    activation_cpu_offload: bool = key("keep blocks' activations in the CPU's memory", False)
    state_dict_type: str = key("of checkpoints: sharded, or full, in one file", "sharded")
    mixed_precision: str = key("Composer's DEFAULT, PURE or FULL", "DEFAULT")
    verbose: bool = key("log what is sharded", False)


@dataclass
class DrawingConfig:
    interval: str = key("how often, such as 10000ba", "10000ba")
    cfg_scale: float = key("guidance; 1 is none", 1.0)
    sampling_method: str = key("an ODE solver", "heun")
    num_steps: int = key("time points", 25)
    seed: int = key("of the pictures' noise", 0)
    batch_size: int = key("pictures at a time on a rank", 64)


@dataclass
class SampleGridConfig(DrawingConfig):
    cfg_scale: float = key("guidance; 1 is none", 1.5)
    labels: list[int] | None = key("of the pictures; null: ten, evenly over the classes", None)
    per_class: int = key("pictures of each label", 4)


@dataclass
class FrechetConfig(DrawingConfig):
    num_images: int = key("pictures drawn, the classes equally often", 5000)
    reference: str = key("statistics of real pictures, that evaluate --save-statistics writes, or ADM's npz")
    features: str = key("inception, or a TorchScript file: as for evaluate", "inception")


@dataclass
class SupervisionConfig:
    heartbeat: float = key("seconds between two signs of life beside the checkpoints", 15.0)
    patience: float = key("seconds for which a failing upload of a checkpoint is tried again", 900.0)
    grace: float = key("seconds that saving after a SIGTERM may take", 25.0)


@dataclass
class Config:
    run_name: str = key("names the run; the same name resumes it")
    seed: int = key("of weights, noise and data order", 0)
    model: ModelConfig = key("the network", ModelConfig())
    transport: TransportConfig = key("the path between noise and data", TransportConfig())
    autoencoder: AutoencoderConfig = key("what lies between pictures and latents", AutoencoderConfig())
    data: DataConfig = key("what is trained on", DataConfig())
    eval_data: DataConfig | None = key("what is evaluated on, with data's keys; null: nothing", None)
    optimizer: OptimizerConfig = key("AdamW", OptimizerConfig())
    scheduler: dict[str, Any] = key("one of Composer's schedulers: {name: arguments}; none: a constant rate", {})
    ema: EMAConfig | None = key("averaged weights; null: none", EMAConfig())
    sample_grid: SampleGridConfig | None = key("pictures drawn during training; null: none", None)
    frechet: FrechetConfig | None = key("Fréchet distance (FID) during training; null: none", None)
    precision: str = key("fp32, amp_bf16 or amp_fp16", "fp32")
    fsdp: FSDPConfig | None = key("sharded training (FSDP2); {} takes its defaults, null is DDP", None)
    supervision: SupervisionConfig = key("what keeps a run alive, and alone", SupervisionConfig())
    trust_checkpoint: bool = key("unpickle a checkpoint of one file whole, which can run code in it", False)
    trainer: dict[str, Any] = key("arguments of Composer's Trainer, by their names", {})
    algorithms: dict[str, Any] = key("Composer's algorithms: {name: arguments}", {})
    callbacks: dict[str, Any] = key("Composer's callbacks: {name: arguments}", {})
    loggers: dict[str, Any] = key("Composer's loggers: {name: arguments}", {})


def network_arguments(model: ModelConfig) -> dict[str, Any]:
    """The constructor arguments of `SiT` that a model section means."""
    arguments = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name != "name"}
    sizes = variant(model.name) if model.name is not None else {}
    return {k: sizes.get(k) if v is None else v for k, v in arguments.items()}
