"""What a run's config must fulfil beyond keys and types, checked before torch is imported.

Every check raises a UserError, mostly ConfigError, with one line: the key, what it got, and what it takes.
"""

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

from sit_composer.choices import (
    FIXED_STEP_METHODS,
    LOSS_WEIGHTS,
    ODE_METHODS,
    PATHS,
    PREDICTIONS,
    TIME_SAMPLINGS,
    choose,
)
from sit_composer.config import composer_classes as composer_api
from sit_composer.config.schema import (
    Config,
    ConfigError,
    DrawingConfig,
    ModelConfig,
    SampleGridConfig,
    TransportConfig,
    network_arguments,
)

# Trainer arguments that have a key of their own, or that a YAML can't hold.
TRAINER_KEYS_ELSEWHERE = {
    "model": "model", "train_dataloader": "data", "eval_dataloader": "eval_data", "optimizers": "optimizer",
    "schedulers": "scheduler", "algorithms": "algorithms", "callbacks": "callbacks", "loggers": "loggers",
    "run_name": "run_name", "seed": "seed", "precision": "precision", "parallelism_config": "fsdp",
}  # fmt: skip
FIXED_TRAINER_KEYS = {  # what resuming, uploading and pruning rely on
    "save_filename", "save_latest_filename", "save_ignore_keys", "num_concurrent_uploads", "upload_timeout_in_seconds",
    "load_object_store", "load_exclude_algorithms",
}  # fmt: skip
SECRET = re.compile(r"((api|access|private|account)_?key(_?id)?|token)$|secret|passw(or)?d|passphrase|credential", re.I)
ADDRESS = re.compile(r"://([^/\s]*|[^/\s:@]*:(?!\d+/)\S*)@")  # with a user, and perhaps a password that has a slash
TIME = re.compile(r"\d+(\.\d+)?(ep|ba|sp|tok|sec|dur|iter)?")
DRAWING_TIME = re.compile(r"[1-9]\d*(ba|ep|sp)|0?\.\d*[1-9]\d*dur")


def check(config: Config, ranks: int | None = None) -> None:
    """Checks all that can be known before the data and the libraries are loaded; ``ranks`` of None: the launcher's."""
    check_no_credentials(vars(config))
    check_model(config.model)
    check_transport(config.transport)
    ranks = ranks or int(os.environ.get("WORLD_SIZE", 1))
    for section, data in (("data", config.data), ("eval_data", config.eval_data)):
        if data is not None:
            _at_least(f"{section}.global_batch_size", data.global_batch_size, 1)
            _at_least(f"{section}.num_workers", data.num_workers, 0)
            _at_least(f"{section}.num_canonical_nodes", data.num_canonical_nodes, 1)
            for name in ("image_size", "predownload"):
                if getattr(data, name) is not None:
                    _at_least(f"{section}.{name}", getattr(data, name), 1)
            if data.global_batch_size % ranks:
                got = f"{section}.global_batch_size: got {data.global_batch_size}"
                raise ConfigError(f"{got}; with {ranks} ranks it takes a multiple of {ranks}")
    if not 0 < config.optimizer.lr < math.inf:
        raise ConfigError(f"optimizer.lr: got {config.optimizer.lr}; it takes a number above 0")
    for name in ("eps", "weight_decay"):
        if not 0 <= getattr(config.optimizer, name) < math.inf:
            raise ConfigError(f"optimizer.{name}: got {getattr(config.optimizer, name)}; it takes a number, 0 or more")
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed: got {config.seed}; it takes a whole number from 0 to 4294967295")
    if len(config.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in config.optimizer.betas):
        raise ConfigError(f"optimizer.betas: got {config.optimizer.betas}; it takes two numbers in [0, 1)")
    if config.ema is not None and not 0 < config.ema.decay < 1:
        raise ConfigError(f"ema.decay: got {config.ema.decay}; it takes a number between 0 and 1")
    for section in ("sample_grid", "frechet"):
        if getattr(config, section) is not None:
            check_drawing(config, section)
    choose("precision", config.precision, ("fp32", "amp_bf16", "amp_fp16"))
    if config.fsdp is not None:
        choose("fsdp.state_dict_type", config.fsdp.state_dict_type, ("sharded", "full"))
        choose("fsdp.mixed_precision", config.fsdp.mixed_precision, ("DEFAULT", "PURE", "FULL"))
        replicas = config.fsdp.data_parallel_replicate_degree
        _at_least("fsdp.data_parallel_replicate_degree", replicas, 1)
        if ranks % replicas:
            raise ConfigError(
                f"fsdp.data_parallel_replicate_degree: got {replicas}; it takes a divisor of {ranks} ranks"
            )
    for name, value in vars(config.supervision).items():
        if not 0 < value < math.inf:
            raise ConfigError(f"supervision.{name}: got {value}; it takes a number of seconds above 0")
    if len(config.scheduler) > 1:
        raise ConfigError(f"scheduler: got {len(config.scheduler)} of them; it takes one, such as {{constant: {{}}}}")
    check_trainer(config)
    for section in composer_api.GROUPS:
        for name, arguments in getattr(config, section).items():
            if section == "callbacks" and name.lower() in ("checkpoint_saver", "checkpointsaver"):
                raise ConfigError(f"callbacks.{name}: set it by trainer.save_interval and the keys beside it")
            if section == "algorithms" and name.lower() == "ema":
                raise ConfigError("algorithms.ema: set it as ema.decay; Composer's own is not used")
            if not isinstance(arguments, dict | None):
                raise ConfigError(f"{section}.{name}: got {arguments!r}; it takes its arguments, as {{name: value}}")
            composer_api.check_group(section, name, arguments or {})


def check_no_credentials(value: Any, name: str = "") -> None:
    """Refuses an address with a password in it, which the saved config, loggers and error messages would repeat."""
    if isinstance(value, str | int | float) and not isinstance(value, bool) and SECRET.search(name):
        raise ConfigError(f"{name}: a secret, which the saved config would repeat; give it by the environment")
    if isinstance(value, str) and ADDRESS.search(value):
        raise ConfigError(f"{name}: an address with credentials in it; give them by the environment")
    if dataclasses.is_dataclass(value):
        value = vars(value)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        check_no_credentials(item, f"{name}.{key}" if name else str(key))


def check_transport(transport: TransportConfig) -> None:
    """Checks the objective."""
    choose("transport.path_type", transport.path_type, PATHS)
    choose("transport.prediction", transport.prediction, PREDICTIONS)
    choose("transport.loss_weight", transport.loss_weight, LOSS_WEIGHTS)
    choose("transport.time_sampling", transport.time_sampling, TIME_SAMPLINGS)
    velocity, vp = transport.prediction == "velocity", transport.path_type == "VP"
    weighted = transport.loss_weight is not None
    for name, pole in (("train_eps", weighted and not velocity and not vp), ("sample_eps", vp or not velocity)):
        eps = getattr(transport, name)
        if eps is not None and not 0 <= eps < 0.5:
            raise ConfigError(f"transport.{name}: got {eps}; it takes a number in [0, 0.5)")
        if eps == 0 and pole:
            raise ConfigError(f"transport.{name}: got 0; there is a pole at an end of the times, it takes more")
    for name in ("time_std", "time_shift"):
        if not 0 < getattr(transport, name) < math.inf:
            raise ConfigError(f"transport.{name}: got {getattr(transport, name)}; it takes a number above 0")
    if not math.isfinite(transport.time_mean):
        raise ConfigError(f"transport.time_mean: got {transport.time_mean}; it takes a number")
    if transport.time_sampling == "uniform":
        for name, default in (("time_mean", 0), ("time_std", 1)):
            if getattr(transport, name) != default:
                raise ConfigError(f"transport.{name}: goes with transport.time_sampling=logit-normal")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name}: got {value}; it takes a whole number, {least} or more")


def check_model(model: ModelConfig) -> None:
    """Checks that a network of these sizes exists."""
    arguments = network_arguments(model)
    for name, value in arguments.items():
        if value is None:
            raise ConfigError(f"model.{name}: no value; give it, or a variant as model.name=SiT-XL/2")
        if name not in ("class_dropout_prob", "learn_sigma", "mlp_ratio"):
            _at_least(f"model.{name}", value, 1)
    if not 1 <= model.mlp_ratio * arguments["hidden_size"] < math.inf:
        raise ConfigError(f"model.mlp_ratio: got {model.mlp_ratio}; it takes a number of at least 1 / hidden_size")
    if not 0 <= model.class_dropout_prob < 1:
        raise ConfigError(f"model.class_dropout_prob: got {model.class_dropout_prob}; it takes a number in [0, 1)")
    hidden_size, num_heads = arguments["hidden_size"], arguments["num_heads"]
    if hidden_size % num_heads or hidden_size % 4:
        raise ConfigError(
            f"model.hidden_size: got {hidden_size}; it takes a multiple of num_heads ({num_heads}), and of 4 for the "
            "sin-cos positions"
        )
    if model.input_size % arguments["patch_size"]:
        raise ConfigError(
            f"model.input_size: got {model.input_size}; it takes a multiple of patch_size ({arguments['patch_size']})"
        )


def check_drawing(config: Config, section: str) -> None:
    """Checks what pictures are drawn with during training."""
    drawing: DrawingConfig = getattr(config, section)
    if not DRAWING_TIME.fullmatch(drawing.interval):
        takes = "a time in batches, epochs, samples or parts of the run, such as 1000ba, 5ep, 100000sp or 0.1dur"
        raise ConfigError(f"{section}.interval: got {drawing.interval!r}; it takes {takes}")
    # Ranks that hold shards of one network must call it equally often, and an adaptive solver decides by its batch.
    methods = ODE_METHODS if config.fsdp is None else FIXED_STEP_METHODS
    choose(f"{section}.sampling_method", drawing.sampling_method, methods)
    _at_least(f"{section}.num_steps", drawing.num_steps, 2)
    _at_least(f"{section}.batch_size", drawing.batch_size, 1)
    _at_least(f"{section}.seed", drawing.seed, 0)
    if not 0 <= drawing.cfg_scale < math.inf:
        raise ConfigError(f"{section}.cfg_scale: got {drawing.cfg_scale}; it takes a number, 0 or more")
    if drawing.cfg_scale != 1 and config.model.class_dropout_prob == 0:
        raise ConfigError(f"{section}.cfg_scale: got {drawing.cfg_scale}; without class dropout it takes 1")
    if isinstance(drawing, SampleGridConfig):
        _at_least(f"{section}.per_class", drawing.per_class, 1)
        for label in drawing.labels or []:
            if not 0 <= label < config.model.num_classes:
                raise ConfigError(f"{section}.labels: got {label}; it takes labels 0 to {config.model.num_classes - 1}")
        return
    _at_least(f"{section}.num_images", drawing.num_images, 2)
    for name in ("reference", "features"):
        path = getattr(drawing, name)
        if not (name == "features" and path == "inception") and not Path(path).is_file():
            raise ConfigError(f"{section}.{name}: no file {path!r}")


def check_trainer(config: Config) -> None:
    """Checks the Trainer's arguments by its own signature, and those that would undo what the others promise."""
    trainer = config.trainer
    for name in trainer.keys() & TRAINER_KEYS_ELSEWHERE.keys():
        raise ConfigError(f"trainer.{name}: set it as {TRAINER_KEYS_ELSEWHERE[name]}, at the top")
    for name in sorted(trainer.keys() & FIXED_TRAINER_KEYS):
        raise ConfigError(f"trainer.{name}: is fixed here, as resuming relies on it; leave it out")
    composer_api.check_trainer(trainer)
    if "max_duration" not in trainer:
        raise ConfigError("trainer.max_duration: no value; it takes a time, such as 400000ba or 80ep")
    for name in ("max_duration", "save_interval", "eval_interval"):
        if name in trainer and not TIME.fullmatch(str(trainer[name])):
            raise ConfigError(f"trainer.{name}: got {trainer[name]!r}; it takes a time, such as 1000ba or 1ep")
    if trainer.get("autoresume") and not trainer.get("save_folder"):
        raise ConfigError("trainer.save_folder: no value; autoresume needs one to resume from")
    if trainer.get("save_weights_only"):
        raise ConfigError(
            "trainer.save_weights_only: got True; it would leave out the EMA and what the weights mean, it takes false"
        )
    if re.fullmatch(r"0+\D*", str(trainer.get("save_interval", 1))):
        raise ConfigError(
            f"trainer.save_interval: got {trainer['save_interval']}; nothing would be saved, it takes more"
        )
    micro = trainer.get("device_train_microbatch_size", 1)
    if micro != "auto" and not (isinstance(micro, int) and micro >= 1):
        raise ConfigError(f"trainer.device_train_microbatch_size: got {micro}; it takes 1 or more, or auto on a GPU")
