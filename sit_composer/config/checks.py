"""What a run's config must fulfil beyond keys and types, checked before torch is imported.

Every check raises a UserError, mostly ConfigError, with one line: the key, its value, and what is expected.
"""

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

from sit_composer import choices
from sit_composer.bounds import Bounds, choose
from sit_composer.cli import is_remote, require, s3_endpoint
from sit_composer.clouds import check_store
from sit_composer.config import composer_classes, schema
from sit_composer.config.schema import Config, ConfigError
from sit_composer.config.times import ANY, check_time, parse_time
from sit_composer.errors import UserError

# Trainer arguments that have a key of their own, or that a YAML can't hold.
TRAINER_KEYS_ELSEWHERE = {
    "model": "model", "train_dataloader": "data", "eval_dataloader": "eval_data", "optimizers": "optimizer",
    "schedulers": "scheduler", "algorithms": "algorithms", "callbacks": "callbacks", "loggers": "loggers",
    "run_name": "run_name", "seed": "seed", "precision": "precision", "parallelism_config": "fsdp",
}  # fmt: skip
FIXED_TRAINER_KEYS = {  # on which resuming, uploading and pruning rely
    "save_filename", "save_latest_filename", "save_ignore_keys", "num_concurrent_uploads", "upload_timeout_in_seconds",
    "load_object_store", "load_exclude_algorithms",
}  # fmt: skip
SECRET = re.compile(r"((api|access|private|account)_?key(_?id)?|token)$|secret|passw(or)?d|passphrase|credential", re.I)
ADDRESS = re.compile(r"://([^/\s]*|[^/\s:@]*:(?!\d+/)\S*)@")  # with a user, and perhaps a password that has a slash
SIGNED = re.compile(r"([?&](?:sig|signature|(?:access_)?token|x-(?:amz|goog)-[\w-]+)=)[^&\s]+", re.I)  # an address
SIZE = re.compile(r"\d+\s*b?|\d+(\.\d+)?\s*[kmgtpezy]b", re.I)  # as streaming reads it


def check(config: Config, ranks: int | None = None) -> None:
    """Checks all that can be known before the data and the libraries are loaded.

    ``ranks`` of None: the launcher's, for a run on this machine, which has to have the packages of its loggers.
    """
    check_no_credentials(config)
    if "s3://" in repr(config):
        s3_endpoint()
    check_keys(config)
    if not config.run_name.strip():
        raise ConfigError("run_name: no value, expected a name, such as first")
    check_model(config.model)
    check_transport(config.transport)
    for name in config.loggers if ranks is None else ():
        composer_classes.check_package("loggers", name)
    ranks = ranks or int(os.environ.get("WORLD_SIZE", 1))
    for section in ("data", "eval_data"):
        limit = getattr(getattr(config, section), "cache_limit", None)
        if limit is not None and not SIZE.fullmatch(limit):
            raise ConfigError(f"{section}.cache_limit: got {limit!r}, expected a number of bytes, such as 100gb")
        n = getattr(getattr(config, section), "global_batch_size", 0)
        if n % ranks:
            raise ConfigError(f"{section}.global_batch_size: got {n}, expected a multiple of {ranks} ({ranks} ranks)")
    if len(config.optimizer.betas) != 2:
        raise ConfigError(f"optimizer.betas: got {config.optimizer.betas}, expected two numbers in [0, 1)")
    names = schema.averages(config)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"ema: got the average {twice} twice, expected each once in decay, decays and power")
    if config.optimizer.name != "muon" and config.optimizer.momentum != schema.OptimizerConfig().momentum:
        raise ConfigError("optimizer.momentum: needs optimizer.name=muon")
    if config.on_nan == "rollback" and not config.trainer.get("save_folder"):
        raise ConfigError("on_nan: got rollback, which needs checkpoints to go back to; set trainer.save_folder")
    choices.check_weights("init_weights", config.init_weights)
    if config.init_from is None and config.init_weights != "ema":
        raise ConfigError("init_weights: needs init_from")
    if config.init_from is not None and config.trainer.get("load_path"):
        raise ConfigError("trainer.load_path: has no place beside init_from; leave one of them out")
    if config.alignment is not None:
        check_alignment(config)
    for section in ("sample_grid", "frechet"):
        if getattr(config, section) is not None:
            check_drawing(config, section)
    if config.loss_by_time is not None:
        check_time("loss_by_time.interval", config.loss_by_time.interval, ANY)
    replicas = config.fsdp.data_parallel_replicate_degree if config.fsdp is not None else 1
    if ranks % replicas:
        raise ConfigError(f"fsdp.data_parallel_replicate_degree: got {replicas}, expected a divisor of {ranks} ranks")
    check_trainer(config)
    check_composer(config)


def check_keys(section: Any, prefix: str = "") -> None:
    """Checks every value by the bounds and choices beside its key in the schema."""
    for f in dataclasses.fields(section):
        value, name = getattr(section, f.name), prefix + f.name
        if dataclasses.is_dataclass(value):
            check_keys(value, f"{name}.")
        elif value is not None:
            if f.metadata["choices"] is not None:
                choose(name, value, f.metadata["choices"])
            if f.metadata["bounds"] is not None:
                for number in value if isinstance(value, list) else [value]:
                    f.metadata["bounds"].check(name, number)


def check_no_credentials(value: Any, name: str = "") -> None:
    """Refuses an address with a password in it, which the saved config, loggers and error messages would repeat."""
    if isinstance(value, str | int | float) and not isinstance(value, bool) and SECRET.search(name):
        raise ConfigError(f"{name}: a secret, which the saved config would repeat; give it by the environment")
    if isinstance(value, str) and (ADDRESS.search(value) or SIGNED.search(value)):
        raise ConfigError(f"{name}: an address with credentials in it; give them by the environment")
    value = vars(value) if dataclasses.is_dataclass(value) else value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        check_no_credentials(item, f"{name}.{key}" if name else str(key))


def redact(value: Any, name: str = "") -> Any:
    """A value for JSON, without the secrets that configs had before they were refused."""
    if isinstance(value, dict):
        return {str(key): redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [redact(item, name) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    if SECRET.search(name):
        return "…"
    if isinstance(value, int | float):
        return value if abs(value) < float("inf") else str(value)
    return SIGNED.sub(r"\1…", ADDRESS.sub("://…@", str(value)))


def check_model(model: schema.ModelConfig) -> None:
    """Checks that a network of these sizes exists."""
    arguments = schema.network_arguments(model)
    for name, value in arguments.items():
        if value is None:
            raise ConfigError(f"model.{name}: no value; set it, or a variant as model.name=SiT-XL/2")
    sizes = ("hidden_size", "num_heads", "input_size", "patch_size")
    choices.check_sizes(**{name: arguments[name] for name in sizes}, prefix="model.")
    options = {**choices.BLOCKS, **arguments}
    names = ("hidden_size", "depth", "num_heads", "rotary", "class_tokens", "class_tokens_start")
    choices.check_blocks(**{name: options[name] for name in names}, prefix="model.")
    least = 2 if options["swiglu"] else 1  # whose maps have two thirds of this width
    if not least <= model.mlp_ratio * arguments["hidden_size"] < math.inf:
        expected = f"a number of at least {least} / hidden_size"
        raise ConfigError(f"model.mlp_ratio: got {model.mlp_ratio}, expected {expected}")


def check_transport(transport: schema.TransportConfig) -> None:
    """Checks that the objective's values go together."""
    choices.check_poles(transport, prefix="transport.")
    choices.check_objective(transport, prefix="transport.")
    choices.check_shift(transport, prefix="transport.")
    normal = "time_sampling=logit-normal"
    for name, needed in {"time_mean": normal, "time_std": normal, "t_eps": "prediction=x"}.items():
        other, _, value = needed.partition("=")
        if getattr(transport, name) != getattr(schema.TransportConfig(), name) and getattr(transport, other) != value:
            raise ConfigError(f"transport.{name}: needs transport.{needed}")


def check_alignment(config: Config) -> None:
    """Checks that the network has the blocks that are aligned, and a teacher."""
    alignment, depth = config.alignment, schema.network_arguments(config.model)["depth"]
    for name in ("block", "teacher_block") if alignment.name == "sra" else ("block",):
        Bounds(1, depth, whole=True).check(f"alignment.{name}", getattr(alignment, name))
    others = ("teacher", "projector", "spatial_norm") if alignment.name == "sra" else ("teacher_block", "time_offset")
    for name in others:
        if getattr(alignment, name) != getattr(schema.AlignmentConfig(), name):
            raise ConfigError(f"alignment.{name}: has no effect with alignment.name={alignment.name}; leave it out")
    if alignment.name == "repa":
        if alignment.teacher is None:
            raise ConfigError("alignment.teacher: no value, expected timm:NAME or transformers:NAME of a model")
        choices.teacher_name(alignment.teacher)
    elif config.ema is None:
        raise ConfigError("ema: got null, expected an average, which alignment.name=sra has as its teacher")


def check_drawing(config: Config, section: str) -> None:
    """Checks how images are generated during training."""
    drawing = getattr(config, section)
    check_time(f"{section}.interval", drawing.interval, ANY)
    if config.fsdp is not None:
        # Ranks that share a network's weights must call it equally often, and an adaptive solver decides by its batch.
        choose(f"{section}.sampling_method", drawing.sampling_method, choices.FIXED_STEP_METHODS)
    if drawing.cfg_scale != 1 and config.model.class_dropout_prob == 0:
        raise ConfigError(f"{section}.cfg_scale: got {drawing.cfg_scale}, expected 1, as there is no class dropout")
    last = config.model.num_classes - 1
    for label in getattr(drawing, "labels", None) or []:
        if label > last:
            raise ConfigError(f"{section}.labels: got {label}, expected labels from 0 to {last}")
    if section == "frechet":
        if not Path(drawing.reference).is_file():
            raise ConfigError(f"frechet.reference: no file {drawing.reference!r}")
        choices.check_features("frechet.features", drawing.features)
        if choices.dinov2_file(drawing.features) is not None:
            require("frechet.features", "timm")


def check_trainer(config: Config) -> None:
    """Checks the Trainer's arguments by its own signature, and refuses those that would break resuming."""
    trainer = config.trainer
    for name in trainer:
        if name in TRAINER_KEYS_ELSEWHERE:
            raise ConfigError(f"trainer.{name}: set it as {TRAINER_KEYS_ELSEWHERE[name]}, at the top level")
        if name in FIXED_TRAINER_KEYS:
            raise ConfigError(f"trainer.{name}: is fixed here, as resuming relies on it; leave it out")
    composer_classes.check("trainer", "", {**trainer, "model": None})
    if config.report and not trainer.get("save_folder"):
        raise ConfigError("report: needs trainer.save_folder, where the page is written")
    if "max_duration" not in trainer:
        raise ConfigError("trainer.max_duration: no value, expected a time, such as 400000ba or 80ep")
    choose("trainer.console_stream", trainer.get("console_stream", "stderr"), ("stdout", "stderr"))
    if trainer.get("autoresume") and not trainer.get("save_folder"):
        raise ConfigError("trainer.save_folder: no value; autoresume needs one to resume from")
    if is_remote(folder := str(trainer.get("save_folder"))):
        try:
            check_store(folder)
        except UserError as error:
            raise ConfigError(f"trainer.save_folder: {error}") from None
    if trainer.get("save_weights_only"):
        raise ConfigError("trainer.save_weights_only: got True, expected false: the EMA and record would be missing")
    if config.compile.lower() != "false" and trainer.get("compile_config") is not None:
        raise ConfigError("trainer.compile_config: has no place beside compile; leave one of them out")
    micro = trainer.get("device_train_microbatch_size", 1)
    if micro != "auto" and not (isinstance(micro, int) and micro >= 1):
        expected = "a whole number of at least 1, or auto on a GPU"
        raise ConfigError(f"trainer.device_train_microbatch_size: got {micro}, expected {expected}")


def check_composer(config: Config) -> None:
    """Checks the names and arguments of Composer's schedulers, algorithms, callbacks and loggers."""
    if len(config.scheduler) > 1:
        raise ConfigError(f"scheduler: got {len(config.scheduler)} of them, expected one, such as {{constant: {{}}}}")
    for section in composer_classes.GROUPS:
        for name, arguments in getattr(config, section).items():
            if section == "callbacks" and name.lower() in ("checkpoint_saver", "checkpointsaver"):
                raise ConfigError(f"callbacks.{name}: set it by trainer.save_interval and the keys beside it")
            if section == "algorithms" and name.lower() == "ema":
                raise ConfigError("algorithms.ema: set it as ema.decay; Composer's own is not used")
            clips = section == "algorithms" and name.lower().replace("_", "") == "gradientclipping"
            if clips and config.optimizer.clip_norm is not None:
                raise ConfigError(f"algorithms.{name}: has no place beside optimizer.clip_norm; leave one of them out")
            if not isinstance(arguments, dict | None):
                raise ConfigError(f"{section}.{name}: got {arguments!r}, expected its arguments, as {{name: value}}")
            composer_classes.check(section, name, arguments or {})
    for name, arguments in config.scheduler.items():
        if arguments and "t_warmup" in arguments and "milestones" not in arguments:
            check_warmup(f"scheduler.{name}", arguments, config.trainer["max_duration"])


def check_warmup(key: str, arguments: dict[str, Any], max_duration: str) -> None:
    """Checks what a scheduler with a warm-up requires of its times, if that doesn't depend on the data's size."""
    t_warmup, t_max = arguments["t_warmup"], arguments.get("t_max", "1dur")
    (whole, unit), (length, unit_of_length) = parse_time(max_duration), parse_time(t_max)
    comparable = {"ep": "ba", "dur": "ba" if unit == "ep" else unit}  # in batches, or in max_duration's unit
    units = [comparable.get(u, u) for u in (parse_time(t_warmup)[1], unit_of_length)]
    if units[0] != units[1]:
        raise ConfigError(f"{key}.t_warmup: got {t_warmup!r}, expected the unit of t_max, {t_max} of {max_duration}")
    if length < {"dur": 1, unit: whole}.get(unit_of_length, 0):
        raise ConfigError(f"{key}.t_max: got {t_max!r}, expected at least trainer.max_duration, {max_duration}")
