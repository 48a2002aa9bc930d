import json
import math
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from sit_composer import train
from sit_composer.choices import BLOCKS, variant
from sit_composer.config import composer_classes
from sit_composer.config.checks import check
from sit_composer.config.data_fits import check_classes_agree, check_data, local_spec
from sit_composer.config.load import load_config, read_yaml
from sit_composer.config.same_run import check_same_config
from sit_composer.config.schema import ConfigError, averages, network_arguments, transport_arguments
from sit_composer.data.spec import DataSpec
from sit_composer.errors import UserError
from sit_composer.sit import SiT, build_sit
from sit_composer.transport import Transport
from tests.helpers.paths import ROOT

QUICKSTART = str(ROOT / "yamls" / "quickstart.yaml")
PAPER = sorted(path.name for path in (ROOT / "yamls").glob("sit_*.yaml"))


def configure(*overrides, path=QUICKSTART):
    config = load_config(path, list(overrides))
    check(config)
    return config


def test_a_time_shift_is_a_number_however_it_is_written_or_auto_with_its_dimensions():
    for text, value in (("2", 2.0), ("0.5", 0.5), ("1e1", 10.0), ("auto", "auto")):
        config = configure(f"transport.time_shift={text}")
        assert config.transport.time_shift == value
        assert type(config.transport.time_shift) is type(value)
    assert transport_arguments(config)["dims"] == 64
    assert "dims" not in transport_arguments(configure())


def test_the_command_line_goes_over_the_yaml():
    config = configure("data.num_workers=3", "optimizer.lr=1e-5", "trainer.max_duration=7ba", "ema=null")
    assert config.data.num_workers == 3
    assert config.optimizer.lr == 1e-5
    assert config.trainer["max_duration"] == "7ba"
    assert config.trainer["autoresume"] is True
    assert config.ema is None
    assert config.data.global_batch_size == load_config(QUICKSTART, []).data.global_batch_size


def test_a_scheduler_on_the_command_line_takes_the_place_of_the_yamls():
    assert configure("scheduler={constant: {}}").scheduler == {"constant": {}}


def test_lightningdit_sets_the_options_of_its_blocks_and_what_is_off_is_left_out():
    sizes = [f"model.{name}=null" for name in ("hidden_size", "depth", "num_heads", "patch_size", "learn_sigma")]
    released = network_arguments(configure("model.name=LightningDiT-B/1", *sizes).model)
    assert variant("LightningDiT-B/1").items() <= released.items()
    assert not released["learn_sigma"]
    changed = configure("model.name=LightningDiT-B/1", *sizes, "model.rotary=false", "model.qk_norm=true").model
    assert network_arguments(changed) == {k: v for k, v in released.items() if k != "rotary"} | {"qk_norm": True}
    plain = network_arguments(configure("model.name=SiT-B/2", *sizes).model)
    assert plain["learn_sigma"]
    assert not BLOCKS.keys() & plain.keys()


@pytest.mark.parametrize(("before", "now"), [("false", "true"), ("true", "false"), ("null", "true")])
def test_a_resumed_run_keeps_the_options_of_its_blocks(before, now):
    text = OmegaConf.to_yaml(OmegaConf.structured(configure(f"model.rotary={before}")))
    check_same_config(configure(f"model.rotary={before}"), text, "runs/a/config.yaml")
    got, expected = now == "true", before == "true"
    with pytest.raises(ConfigError, match=rf"model.rotary: got {got}, expected {expected}, the value of the run in"):
        check_same_config(configure(f"model.rotary={now}"), text, "runs/a/config.yaml")


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ("{decay: 0.9}", "{decay: 0.5}", None),
        ("{decay: 0.9}", "{decays: [0.5]}", None),
        (
            "{decay: 0.9}",
            "{power: [0.1]}",
            "ema: got power0.1, expected one exponential average, the value of the run in",
        ),
        ("{decay: 0.9, power: [0.1]}", "{decay: 0.9}", "ema: got one exponential average, expected 0.9, power0.1, the"),
        ("{decays: [0.9, 0.5]}", "{decays: [0.5, 0.9]}", "ema: got 0.5, 0.9, expected 0.9, 0.5, the value"),
        ("null", "{power: [0.1]}", "ema: got power0.1, expected None"),
    ],
)
def test_a_resumed_run_keeps_its_averages_but_for_a_single_ones_decay(before, now, said):
    text = OmegaConf.to_yaml(OmegaConf.structured(configure("ema.decay=null", f"ema={before}")))
    with nullcontext() if said is None else pytest.raises(ConfigError, match=re.escape(said)):
        check_same_config(configure("ema.decay=null", f"ema={now}"), text, "runs/a/config.yaml")


def test_an_average_has_the_papers_decay_unless_others_are_given():
    assert averages(configure("ema.decay=null")) == ["0.9999"]
    assert averages(configure("ema.decay=null", "ema.decays=[0.999, 1e-5]")) == ["0.999", "1e-05"]
    assert averages(configure("ema={decay: 0.99, power: [0.05]}")) == ["0.99", "power0.05"]
    assert averages(configure("ema=null")) == []


def test_a_run_of_before_these_options_can_be_resumed():
    text = OmegaConf.to_yaml(OmegaConf.structured(configure()))
    old = "\n".join(line for line in text.splitlines() if line.strip().partition(":")[0] not in BLOCKS)
    assert "rotary" not in old
    check_same_config(configure(), old, "runs/a/config.yaml")


def test_a_resumed_run_may_clip_and_may_treat_what_is_not_finite_otherwise():
    text = OmegaConf.to_yaml(OmegaConf.structured(configure("optimizer.clip_norm=2")))
    check_same_config(configure("on_nan=skip", "optimizer.clip_norm=1"), text, "runs/a/config.yaml")


def test_what_is_not_finite_needs_a_checkpoint_to_roll_back_to_and_gradients_are_clipped_once():
    with pytest.raises(ConfigError, match=r"^on_nan: got rollback, which needs .* set trainer\.save_folder$"):
        configure("on_nan=rollback", "trainer.save_folder=null", "trainer.autoresume=false")
    composers = "algorithms={gradient_clipping: {clipping_type: norm, clipping_threshold: 1}}"
    configure(composers)
    with pytest.raises(ConfigError, match=r"^algorithms\.gradient_clipping: has no place beside optimizer\.clip_norm"):
        configure(composers, "optimizer.clip_norm=1")


def test_a_variant_is_shorthand_and_sizes_go_over_it():
    model = configure("model.name=SiT-B/4", "model.hidden_size=null", "model.patch_size=null", "model.depth=3").model
    arguments = network_arguments(model)
    assert (arguments["hidden_size"], arguments["patch_size"], arguments["depth"]) == (768, 4, 3)


@pytest.mark.parametrize("name", PAPER)
def test_a_papers_yaml_is_whole_but_for_its_places(name):
    path = str(ROOT / "yamls" / name)
    with pytest.raises(ConfigError, match=r"data\.local: no value"):
        configure(path=path)
    config = configure("data.remote=s3://b/d", "data.local=/tmp/d", "trainer.save_folder=s3://b/r", path=path)
    assert config.optimizer.lr == 1e-4
    assert config.ema.decay == 0.9999
    assert config.data.global_batch_size == 256


@pytest.mark.parametrize(
    "name", [*PAPER, "lightningdit_xl_1.yaml", "rae_lightningdit_xl_1.yaml", "pixel_jit_b_16.yaml"]
)
def test_a_yamls_header_has_the_numbers_that_follow_from_its_network(name):
    path = ROOT / "yamls" / name
    content = yaml.safe_load(path.read_text())
    with torch.device("meta"):
        network = (build_sit if "name" in content["model"] else SiT)(**content["model"])
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    images_a_second = 356e12 / (6 * network.forward_macs())
    header = " ".join(line.strip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"{20 * trained / 1e9:.1f} GB of weights" in header
    assert f"({images_a_second:.0f} images/s)" in header
    steps, batch = int(content["trainer"]["max_duration"].removesuffix("ba")), content["data"]["global_batch_size"]
    assert f"{steps * batch / (8 * images_a_second) / 3600:.1f} h for {steps // 1000}k steps" in header


def test_lightningdits_yaml_is_its_repositorys_recipe():
    """configs/reproductions/lightningdit_xl_vavae_f16d32_64ep_cfg.yaml."""
    places = ("data.remote=s3://b/d", "data.local=/tmp/d", "trainer.save_folder=s3://b/r", "autoencoder.name=vavae")
    config = configure(*places, path=str(ROOT / "yamls" / "lightningdit_xl_1.yaml"))
    network = network_arguments(config.model)
    assert {**variant("LightningDiT-XL/1"), "in_channels": 32, "input_size": 16}.items() <= network.items()
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.weight_decay) == (2e-4, [0.9, 0.95], 0)
    assert (config.data.global_batch_size, config.trainer["max_duration"]) == (1024, "80000ba")
    assert (config.transport.time_sampling, config.transport.prediction) == ("logit-normal", "velocity")


def test_raes_yaml_is_its_repositorys_recipe_but_for_the_head():
    """configs/stage2/training/ImageNet256/DiTDH-XL_DINOv2-B.yaml; 676 M parameters are those of their DiT-XL."""
    places = ("data.remote=s3://b/d", "data.local=/tmp/d", "trainer.save_folder=s3://b/r")
    config = configure(*places, path=str(ROOT / "yamls" / "rae_lightningdit_xl_1.yaml"))
    network, transport = network_arguments(config.model), Transport(**transport_arguments(config))
    assert {**variant("LightningDiT-XL/1"), "in_channels": 768, "input_size": 16}.items() <= network.items()
    with torch.device("meta"):
        trained = sum(p.numel() for p in SiT(**network).parameters() if p.requires_grad)
    assert trained // 1e6 == 676
    assert transport.shift == transport.sampling_shift == pytest.approx(math.sqrt(196608 / 4096))
    assert (transport.time_sampling, transport.prediction, transport.loss_weight) == ("logit-normal", "velocity", None)
    assert (config.optimizer.lr, config.optimizer.betas, config.ema.decay) == (2e-4, [0.9, 0.95], 0.9995)
    assert (config.data.global_batch_size, config.trainer["max_duration"]) == (1024, "100000ba")
    assert config.algorithms == {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0}}


def test_jits_yaml_is_its_repositorys_recipe_but_for_the_patch_embedding():
    """The README's example; its patch embedding has 16²·3·128 + 128·768 weights, and ours 16²·3·768."""
    places = ("data.remote=s3://b/d", "data.local=/tmp/d", "trainer.save_folder=s3://b/r")
    config = configure(*places, path=str(ROOT / "yamls" / "pixel_jit_b_16.yaml"))
    transport, epoch = Transport(**transport_arguments(config)), 1281167 // 1024
    with torch.device("meta"):
        trained = sum(p.numel() for p in SiT(**network_arguments(config.model)).parameters() if p.requires_grad)
    assert (trained - 768 * 768 + 768 * 128 + 128 * 768) // 1e6 == 131
    assert (transport.prediction, transport.loss_weight, transport.t_eps) == ("x", "velocity", 0.05)
    half = torch.tensor([0.5], dtype=torch.float64)  # their median time is the sigmoid of P_mean, from noise at 0
    assert transport.times(half).item() == pytest.approx(1 / (1 + math.exp(0.8)))
    assert (config.optimizer.lr, config.optimizer.betas, config.ema.decay) == (5e-5 * 1024 / 256, [0.9, 0.95], 0.9999)
    assert config.scheduler == {"constant_with_warmup": {"t_warmup": f"{5 * epoch}ba"}}
    assert int(config.trainer["max_duration"].removesuffix("ba")) == pytest.approx(600 * epoch, rel=1e-3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modl.depth=3", "modl: no such key; did you mean model?"),
        ("model.hiden_size=3", "model.hiden_size: no such key; did you mean hidden_size?"),
        ("data.num_workers=four", "data.num_workers: got 'four', expected a whole number"),
        ("optimizer.lr=fast", "optimizer.lr: got 'fast', expected a number"),
        ("optimizer.betas=0.9,0.99", "optimizer.betas: expected a list in brackets"),
        ("data.flip=maybe", "data.flip: got 'maybe', expected true or false"),
        ("depth", "'depth': invalid override, expected key=value"),
        ("model.hidden_size=130", "model.hidden_size: got 130, expected a multiple of num_heads (4)"),
        ("model.input_size=9", "model.input_size: got 9, expected a multiple of patch_size (2)"),
        ("model.depth=0", "model.depth: got 0, expected a whole number of at least 1"),
        ("model.depth=null", "model.depth: no value; set it, or a variant"),
        ("model.name=SiT-XXL/2", "model.name: got 'SiT-XXL/2', expected SiT-S/2"),
        ("model.class_dropout_prob=1", "model.class_dropout_prob: got 1.0, expected a number in [0, 1)"),
        ("transport.path_type=linear", "transport.path_type: got 'linear', expected Linear, GVP, VP"),
        ("transport.prediction=eps", "transport.prediction: got 'eps'"),
        ("transport.loss_weight=snr", "transport.loss_weight: got 'snr', expected None, velocity, likelihood"),
        ("transport.train_eps=0.6", "transport.train_eps: got 0.6, expected a number in [0, 0.5)"),
        ("transport.time_sampling=cosine", "transport.time_sampling: got 'cosine', expected uniform, logit-normal"),
        ("transport.time_std=0", "transport.time_std: got 0.0, expected a number above 0"),
        ("transport.time_std=.inf", "transport.time_std: got inf, expected a number above 0"),
        ("transport={time_sampling: logit-normal, time_mean: .nan}", "transport.time_mean: got nan, expected a number"),
        ("alignment={name: sar, block: 1}", "alignment.name: got 'sar', expected sra, repa; did you mean sra?"),
        ("alignment={block: 1}", "alignment.name: no value"),
        ("alignment={name: sra, block: 9}", "alignment.block: got 9, expected a whole number in [1, 4]"),
        ("alignment={name: sra, block: 2}", "alignment.teacher_block: got 20, expected a whole number in [1, 4]"),
        ("alignment={name: repa, block: 1}", "alignment.teacher: no value, expected timm:NAME or transformers:NAME"),
        ("alignment={name: repa, block: 1, teacher: dinov2}", "alignment.teacher: got 'dinov2', expected timm:NAME"),
        ("alignment={name: repa, block: 9, teacher: timm:vit}", "alignment.block: got 9, expected a whole number in"),
        ("alignment={name: repa, block: 1, spatial_norm: 2}", "alignment.spatial_norm: got 2.0, expected a number in"),
        ("alignment={name: repa, block: 1, teacher: timm:vit, time_offset: 0.1}", "alignment.time_offset: has no"),
        ("alignment={name: sra, block: 1, teacher_block: 2, teacher: timm:vit}", "alignment.teacher: has no effect"),
        ("alignment={name: sra, time_offset: 2}", "alignment.time_offset: got 2.0, expected a number in [0, 1]"),
        ("transport.time_mean=1", "transport.time_mean: needs transport.time_sampling=logit-normal"),
        ("transport={prediction: noise, sample_eps: 0}", "transport.sample_eps: got 0, expected a number above 0"),
        ("transport={prediction: score, loss_weight: velocity, train_eps: 0}", "transport.train_eps: got 0, expected"),
        ("optimizer.lr=.inf", "optimizer.lr: got inf, expected a number above 0"),
        ("transport.time_shift=0", "transport.time_shift: got 0.0, expected a number above 0, or auto"),
        ("transport.time_shift=atuo", "transport.time_shift: got atuo, expected a number above 0, or auto"),
        ("transport={time_shift: auto, sample_eps: 0.01}", "transport.sample_eps: got 0.01, expected null beside"),
        ("transport={time_shift: auto, train_eps: 0.01}", "transport.train_eps: got 0.01, expected null beside"),
        ("transport={prediction: x, loss_weight: likelihood}", "transport.loss_weight: got likelihood"),
        ("transport={prediction: x, t_eps: 0}", "transport.t_eps: got 0.0, expected a number in (0, 0.5)"),
        ("transport.t_eps=0.01", "transport.t_eps: needs transport.prediction=x"),
        ("data.global_batch_size=0", "data.global_batch_size: got 0"),
        ("eval_data={local: x, global_batch_size: 0}", "eval_data.global_batch_size: got 0, expected a whole number"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas: got 1.0, expected a number in [0, 1)"),
        ("sample_grid={labels: [-1]}", "sample_grid.labels: got -1, expected a whole number of at least 0"),
        ("fsdp={mixed_precision: half}", "fsdp.mixed_precision: got 'half', expected DEFAULT, PURE, FULL"),
        ("transport.path_type=null", "transport.path_type"),
        ("optimizer.lr=0", "optimizer.lr: got 0.0, expected a number above 0"),
        ("optimizer.name=moun", "optimizer.name: got 'moun', expected adamw, muon; did you mean muon?"),
        ("optimizer.momentum=0.9", "optimizer.momentum: needs optimizer.name=muon"),
        ("optimizer.clip_norm=0", "optimizer.clip_norm: got 0.0, expected a number above 0"),
        ("on_nan=skipp", "on_nan: got 'skipp', expected stop, skip, rollback; did you mean skip?"),
        ("on_nan_limit=0", "on_nan_limit: got 0, expected a whole number of at least 1"),
        ("optimizer={name: muon, momentum: 1}", "optimizer.momentum: got 1.0, expected a number in [0, 1)"),
        ("optimizer.betas=[0.9]", "optimizer.betas: got [0.9], expected two numbers"),
        ("ema.decay=1", "ema.decay: got 1.0, expected a number in (0, 1)"),
        ("ema.decays=[0.9, 1]", "ema.decays: got 1.0, expected a number in (0, 1)"),
        ("ema.power=[0.3]", "ema.power: got 0.3, expected a number in (0, 0.2886751346)"),
        ("ema={decay: 0.9, decays: [0.5, 0.9]}", "ema: got the average 0.9 twice, expected each once"),
        ("sample_grid={labels: [10]}", "sample_grid.labels: got 10, expected labels from 0 to 9"),
        ("frechet={features: none.pt, reference: none.npz}", "frechet.reference: no file 'none.npz'"),
        ("frechet={interval: 5ba}", "frechet.reference: no value"),
        ("frechet={num_images: 1, reference: none.npz}", "frechet.num_images: got 1"),
        ("sample_grid={sampling_method: Euler}", "sample_grid.sampling_method: got 'Euler'"),
        ("sample_grid={interval: often}", "sample_grid.interval: got 'often'"),
        ("sample_grid={interval: 0ba}", "sample_grid.interval: got '0ba', expected a time above 0"),
        ("sample_grid={interval: 1.5ep}", "sample_grid.interval: got '1.5ep', expected a time above 0 in whole"),
        ("sample_grid={interval: '10'}", "sample_grid.interval: got '10', expected a time above 0"),
        ("sample_grid={interval: 5sec}", "sample_grid.interval: got '5sec', expected a time above 0"),
        ("precision=int8", "precision: got 'int8', expected auto, fp32, bf16, amp_bf16"),
        ("fsdp={sharding_strategy: FULL_SHARD}", "fsdp.sharding_strategy: no such key; expected"),
        ("trainer.save_folder=s3://key:secret@bucket/run", "trainer.save_folder: an address with credentials in it"),
        ("loggers={mlflow: {tracking_uri: 'https://me:secret@host'}}", "loggers.mlflow.tracking_uri: an address with"),
        ("callbacks={checkpoint_saver: {}}", "callbacks.checkpoint_saver: set it by trainer.save_interval"),
        ("loggers={neptune: {api_token: abc}}", "loggers.neptune.api_token: a secret, which the saved config"),
        ("loggers={a: {b: {aws_secret_access_key: abc}}}", "loggers.a.b.aws_secret_access_key: a secret, which"),
        ("loggers={a: {password: 1234}}", "loggers.a.password: a secret, which"),
        ("loggers={a: {uri: 'https://me:sec/ret@host'}}", "loggers.a.uri: an address with credentials in it"),
        ("data.remote=https://host/c?sv=1&sig=a%2Fb", "data.remote: an address with credentials in it"),
        ("data.remote=https://host/c?X-Goog-Signature=ab", "data.remote: an address with credentials in it"),
        ("supervision.grace=0", "supervision.grace: got 0.0, expected a number above 0"),
        ("trainer.save_filename=x.pt", "trainer.save_filename: is fixed here"),
        ("fsdp={state_dict_type: local}", "fsdp.state_dict_type: got 'local', expected sharded, full"),
        ("fsdp={data_parallel_replicate_degree: 3}", "fsdp.data_parallel_replicate_degree: got 3, expected a divisor"),
        ("scheduler={constant: {}, cosine_annealing: {}}", "scheduler: got 2 of them, expected one"),
        ("scheduler={cosine: {}}", "scheduler.cosine: Composer has no such class"),
        ("trainer.max_duration=long", "trainer.max_duration: got 'long', expected a time"),
        ("trainer.autoresum=true", "trainer.autoresum: Trainer has no such argument; did you mean autoresume?"),
        ("trainer.progress_bar=7", "trainer.progress_bar: got 7, expected bool"),
        ("trainer.precision=fp32", "trainer.precision: set it as precision, at the top level"),
        ("trainer.save_folder=null", "trainer.save_folder: no value; autoresume needs one"),
        ("trainer.save_weights_only=true", "trainer.save_weights_only: got True, expected false: the EMA"),
        ("trainer.save_interval=0ba", "trainer.save_interval: got '0ba', expected a time above 0"),
        ("trainer.device_train_microbatch_size=1.5", "trainer.device_train_microbatch_size: got 1.5"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay: got -1.0, expected a number of at least 0"),
        ("optimizer.eps=nan", "optimizer.eps: got nan"),
        ("seed=-1", "seed: got -1, expected a whole number in [0, 4294967295]"),
        ("model.mlp_ratio=inf", "model.mlp_ratio: got inf"),
        ("model.class_tokens=-1", "model.class_tokens: got -1, expected a whole number of at least 0"),
        ("model.class_tokens_start=1", "model.class_tokens_start: got 1, expected 0, as class_tokens is 0"),
        ("model.name=LightningDiT-S/1", "model.name: got 'LightningDiT-S/1', expected SiT-S/2, SiT-S/4, SiT-S/8,"),
        ("data.image_size=0", "data.image_size: got 0, expected a whole number of at least 1"),
        ("callbacks={a: [", "callbacks={a: [: while parsing a flow"),
        ("callbacks=[speed_monitor]", "callbacks: got ['speed_monitor'], expected keys and values"),
        ("ema=5", "ema"),
        ("trainer.device_train_microbatch_size=0", "trainer.device_train_microbatch_size: got 0"),
        ("algorithms.ema={}", "algorithms.ema: set it as ema.decay"),
        ("callbacks.sped_monitor={}", "callbacks.sped_monitor: Composer has no such class; did you mean SpeedMonitor?"),
        ("callbacks.speed_monitor.windw_size=3", "windw_size: SpeedMonitor has no such argument; did you mean window_"),
        ("callbacks.lr_monitor=3", "callbacks.lr_monitor: got 3, expected its arguments"),
        ("loggers.file={filname: x}", "loggers.file.filname: FileLogger has no such argument; did you mean filename?"),
        ("algorithms.gradient_clipping={}", "algorithms.gradient_clipping.clipping_type: no value"),
        ("run_name=", "run_name: no value"),
        ("init_from=", "init_from: no value, expected a checkpoint, or null for none"),
        ("data.cache_limit=100 gigs", "data.cache_limit: got '100 gigs', expected a number of bytes, such as 100gb"),
        ("data.num_workers=1:30", "data.num_workers: got '1:30', expected a whole number"),
        ("data.num_workers=0x10", "data.num_workers: got '0x10', expected a whole number"),
        ("data.num_workers=1e3", "data.num_workers: got '1e3', expected a whole number"),
        ("optimizer.lr=1:30.5", "optimizer.lr: got '1:30.5', expected a number"),
        ("callbacks.speed_monitor.window_size=1:30", "callbacks.speed_monitor.window_size: got '1:30', expected int"),
        ("callbacks.optimizer_monitor.batch_log_interval=0", "batch_log_interval: got 0, expected a whole number"),
        ("scheduler={multi_step: {milestones: 5ba}}", "scheduler.multi_step.milestones: got '5ba', expected a list"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_by_key_value_and_what_is_taken(override, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - its message is checked below
        configure(override)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# What Composer 0.32 does with each, tried out: refuses it once the run has started, never ends, or never does it.
@pytest.mark.parametrize(
    ("key", "admitted", "refused"),
    [
        ("trainer.max_duration", "10ba 2ep 300sp 10.0ba 1e1ba 10BA", "1000tok 10iter 0.5ep 1dur 5sec 0ba 100 1h"),
        ("trainer.save_interval", "4ba 1ep 8sp 600sec 0.1dur 1dur", "64tok 1iter 0.5ep 0ba 0dur 1 0 -1ba often"),
        ("trainer.eval_interval", "4ba 1ep 8sp 600sec .5dur", "64tok 1iter 0.5ep 0ba 1"),
        ("trainer.console_log_interval", "4ba 1ep", "8sp 0.1dur 5sec 0ba 100"),
        ("sample_grid.interval", "4ba 1ep 8sp 0.1dur", "5sec 64tok 1iter 0.5ep 0ba 100"),
        ("scheduler.linear.t_max", "8ba 1ep 8sp 0.8dur", "64tok 5sec 0.5ep 0ba 100"),
        ("scheduler.constant_with_warmup.t_warmup", "8ba 1ep 0.1dur 0ba", "64tok 5sec 0.3ep 100"),
        ("scheduler.multi_step.milestones", "[8ba,0.9dur]", "[8ba,0.5ep] [64tok]"),
        ("callbacks.activation_monitor.interval", "8ba 1ep", "8sp 0.1dur 64tok 0ba 100"),
        ("loggers.console.log_interval", "8ba 1ep", "8sp 0.1dur 64tok 0ba 100"),
        ("algorithms.swa.swa_start", "1ep 0.7dur", "8ba 1 0.5ep"),
    ],
)
def test_times_are_admitted_where_composer_can_use_them(key, admitted, refused):
    others = ["sample_grid={}", "scheduler={}" if key.startswith("scheduler") else "scheduler={constant: {}}"]
    for value in admitted.split():
        configure(*others, f"{key}={value}")
    for value in refused.split():
        with pytest.raises(ConfigError, match=rf"{key}: got .*{value.strip('[]').split(',')[-1]}.*, expected .*\("):
            configure(*others, f"{key}={value}")


def test_a_warm_up_has_the_unit_of_its_schedule_and_the_schedule_covers_the_run():
    cosine = "scheduler={{cosine_annealing_with_warmup: {{t_warmup: {}, t_max: {}}}}}"
    for t_warmup, t_max, duration in (("2ba", "10ba", "10ba"), ("1ep", "1dur", "10ba"), ("2ba", "3ep", "2ep")):
        configure(cosine.format(t_warmup, t_max), f"trainer.max_duration={duration}")
    with pytest.raises(ConfigError, match=r"t_warmup: got '2ba', expected the unit of t_max, 1dur of 300sp"):
        configure(cosine.format("2ba", "1dur"), "trainer.max_duration=300sp")
    for t_max in ("8ba", "0.8dur"):
        with pytest.raises(ConfigError, match=rf"t_max: got '{t_max}', expected at least trainer.max_duration, 10ba"):
            configure(cosine.format("2ba", t_max), "trainer.max_duration=10ba")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.rotary=true", "model.num_heads=64"],
            "model.num_heads: got 64, whose heads are 2 wide, expected a width",
        ),
        (
            ["model.class_tokens=2", "model.class_tokens_start=4"],
            "class_tokens_start: got 4, expected one of the 4 blo",
        ),
        (
            ["model.swiglu=true", "model.mlp_ratio=0.01"],
            "model.mlp_ratio: got 0.01, expected a number of at least 2 / ",
        ),
    ],
)
def test_options_of_blocks_that_do_not_fit_are_told_together(overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        configure(*overrides)


NAMES = "12_34 1.10 007 1e5 no on null ~ true 0x10 1:30 2024-01-01 .inf {a} [1] &a *a %x @x - a=b a_#b a:_b None '"


@pytest.mark.parametrize("name", [name.replace("_#", " #").replace(":_", ": ") for name in NAMES.split()])
def test_text_is_kept_as_it_was_typed(name):
    typed = f"loggers.wandb.project={name}", f"loggers.wandb.tags=[{json.dumps(name)}]", f"trainer.load_path={name}"
    config = load_config(QUICKSTART, [f"run_name={name}", f"data.local={name}", *typed])
    assert [config.run_name, config.data.local, *config.loggers["wandb"]["tags"]] == [name] * 3
    optional = None if name in ("null", "~") else name
    assert [config.loggers["wandb"]["project"], config.trainer["load_path"]] == [optional] * 2
    # What a run saves is read as the same again, also by an earlier version.
    saved = OmegaConf.to_yaml(OmegaConf.structured(config))
    assert read_yaml(saved, "")["run_name"] == OmegaConf.create(saved).run_name == name


def test_text_in_a_yaml_is_kept_as_it_was_typed(tmp_path):
    path = tmp_path / "run.yaml"
    text = """
run_name: 2024_01_05
data: &data {local: 007, remote: null, global_batch_size: 010, flip: no, num_workers: 1_0}
eval_data: {<<: *data, local: "null"}
autoencoder: {name: ~/vae}
trainer: {max_duration: 1e2ba, progress_bar: off, load_ignore_keys: [1.10, no]}
loggers: {wandb: {project: 1.10, tags: [no, 1:30], init_kwargs: {a: 1.5, b: 010, c: no, d: true, e: null, f: "1"}}}
"""
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):  # Windows' editors write a byte order mark
        path.write_text(text, encoding)
        config = load_config(str(path), [])
        assert config.run_name == "2024_01_05"
        data = config.data
        assert (data.local, data.remote, data.global_batch_size, data.flip) == ("007", None, 10, False)
        assert (data.num_workers, config.eval_data.local, config.eval_data.num_workers) == (10, "null", 10)
        assert config.autoencoder.name == os.path.expanduser("~/vae")
        assert config.trainer == {"max_duration": "1e2ba", "progress_bar": False, "load_ignore_keys": ["1.10", "no"]}
        arguments = {"a": 1.5, "b": 10, "c": "no", "d": True, "e": None, "f": "1"}
        assert config.loggers["wandb"] == {"project": "1.10", "tags": ["no", "1:30"], "init_kwargs": arguments}


def test_quotes_around_a_text_on_the_command_line_are_yamls():
    assert load_config(QUICKSTART, ["run_name='007'"]).run_name == "007"
    assert load_config(QUICKSTART, ['data.remote="null"']).data.remote == "null"


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(
        QUICKSTART, ["data.local=~/d", "trainer.save_folder=~/runs/{run_name}", "loggers.file={filename: ~/l}"]
    )
    assert config.data.local == f"{tmp_path}/d"
    assert config.trainer["save_folder"] == f"{tmp_path}/runs/{{run_name}}"
    assert config.loggers["file"]["filename"] == f"{tmp_path}/l"


@pytest.mark.parametrize(("logger", "package"), composer_classes.PACKAGES.items())
def test_a_package_that_a_logger_needs_is_named_before_training(monkeypatch, logger, package):
    monkeypatch.setattr("sit_composer.cli.find_spec", lambda name: None)
    name = logger.lower().removesuffix("logger")
    with pytest.raises(UserError, match=rf"loggers\.{name}: the package {package} is not installed; run pip install"):
        configure(f"loggers.{name}={{}}")
    check(load_config(QUICKSTART, [f"loggers.{name}={{}}"]), ranks=8)  # only asked about, on another machine


def test_ranks_that_do_not_divide_the_batch_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"expected a multiple of 3 \(3 ranks\)"):
        configure()


@pytest.mark.parametrize(
    ("text", "message"),
    [("model: [", "not YAML"), ("- 1", "not a YAML of keys and values"), ("run_name: a\nrun_name: b", "duplicate key")],
)
def test_a_file_that_is_no_config_is_named(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(str(path), [])
    assert str(path) in str(error.value)


def spec(**changes) -> DataSpec:
    values = {"kind": "pixels", "channels": 1, "image_size": 8, "num_classes": 10, "samples": 1797}
    values |= {"classes": [str(i) for i in range(10)], "class_counts": [180] * 10}
    return DataSpec(**values | changes)


LATENTS = {"name": "some/vae", "scale": 0.2, "shift": 0.0, "channels": 4, "downsample": 8}


@pytest.mark.parametrize(
    ("overrides", "changes", "message"),
    [
        (
            [],
            {"num_classes": 11, "classes": ["a"] * 11, "class_counts": [1] * 11},
            "expected 11: runs/quickstart/shards has 11",
        ),
        (
            ["model.num_classes=12"],
            {},
            "model.num_classes: got 12, expected 10: runs/quickstart/shards has",
        ),
        ([], {"channels": 3}, "model.in_channels: got 1, expected 3"),
        (["data.image_size=16"], {}, "model.input_size: got 8, expected 16"),
        (["model.input_size=16"], {}, "model.input_size: got 16, expected 8"),
        ([], {"samples": 60}, "data.global_batch_size: got 64, expected at most 60"),
        (
            [],
            {"kind": "latents", "autoencoder": LATENTS},
            "autoencoder.name: got None, expected some/vae",
        ),
        (
            ["autoencoder.name=some/vae", "model.in_channels=4"],
            {"kind": "latents", "autoencoder": LATENTS, "channels": 4, "image_size": 250},
            "data.image_size: got 250, expected a multiple of 8",
        ),
    ],
)
def test_data_that_does_not_fit_the_network_is_refused(overrides, changes, message):
    with pytest.raises(ConfigError) as error:
        check_data(configure(*overrides), spec(**changes))
    assert message in str(error.value)


def test_one_folder_of_an_autoencoder_has_many_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vae").mkdir()
    other = {
        "kind": "latents",
        "channels": 4,
        "autoencoder": LATENTS | {"name": str(tmp_path / "vae"), "downsample": 1},
    }
    for name in ("vae", "./vae", f"{tmp_path}/vae"):
        check_data(configure(f"autoencoder.name={name}", "model.in_channels=4"), spec(**other))
    with pytest.raises(ConfigError, match=r"autoencoder\.name: got \./no, expected .*/vae"):
        check_data(configure("autoencoder.name=./no", "model.in_channels=4"), spec(**other))


def test_data_that_fits_passes():
    check_data(configure(), spec())


def test_sections_whose_labels_mean_different_things_are_refused():
    check_classes_agree({"data": spec(), "eval_data": spec()})
    other = spec(classes=[str(i) for i in reversed(range(10))])
    with pytest.raises(ConfigError, match=r"eval_data\.local: its classes are not data's"):
        check_classes_agree({"data": spec(), "eval_data": other})


def test_a_folder_without_shards_says_what_makes_them(tmp_path):
    config = configure(f"data.local={tmp_path}")
    with pytest.raises(ConfigError, match=r"data\.local: no shards in .*make them by convert/to_mds\.py"):
        local_spec(config.data)


def test_a_malformed_spec_is_named(tmp_path):
    (tmp_path / "spec.json").write_text('{"version": 1, "kind": "pixels"}')
    with pytest.raises(ConfigError, match=r"spec\.json is not a shard spec"):
        local_spec(configure(f"data.local={tmp_path}").data)
    (tmp_path / "spec.json").write_text('{"version": 9}')
    with pytest.raises(ConfigError, match=r"spec\.json: written by a newer version of sit_composer \(format 9\)"):
        local_spec(configure(f"data.local={tmp_path}").data)


@pytest.mark.parametrize("arguments", [["--help"], [QUICKSTART, "modl.depth=3"]])
def test_help_and_mistakes_import_nothing_heavy(arguments):
    code = (
        "import sys, runpy; sys.argv = ['sit_composer/train.py', *sys.argv[1:]]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert not {'torch', 'composer', 'streaming', 'numpy'} & sys.modules.keys()"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "AssertionError" not in done.stderr
    if arguments == ["--help"]:
        assert done.returncode == 0
        assert "data.global_batch_size" in done.stdout
    else:
        assert done.returncode == 2
        assert done.stderr == "error: modl: no such key; did you mean model?\n"
    assert time.monotonic() - start < 30  # two seconds on a free machine; here others may be at work


@pytest.mark.parametrize("arguments", [[], ["--dry-run"], ["run_name=first", "data.local=/data"]])
def test_without_a_yaml_the_command_asks_for_one_and_names_some_that_exist(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        train.main(arguments)
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2
    assert "argument yaml: no value, expected a run's config" in last
    named = re.findall(r"yamls/\w+\.yaml", last)
    assert len(named) == 3
    assert all((ROOT / name).is_file() for name in named)


def test_every_yaml_bounds_the_checkpoints_that_it_keeps():
    for path in (ROOT / "yamls").glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["trainer"]["save_num_checkpoints_to_keep"] >= 1, path
