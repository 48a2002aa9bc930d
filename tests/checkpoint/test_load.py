"""Checkpoints that others wrote: the authors' files, exported folders, and what is damaged or planted."""

import argparse
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sit_composer.autoencoder import AutoencoderSpec
from sit_composer.checkpoint.load import CheckpointError, fetch, load_checkpoint
from sit_composer.checkpoint.record import FORMAT, NoSuchWeights, Record
from sit_composer.errors import StorageError
from sit_composer.sit import SiT, build_sit
from tests.helpers.paths import REFERENCE

TINY = {"input_size": 8, "hidden_size": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
TRANSPORT = {"path_type": "VP", "prediction": "noise"}


@pytest.fixture
def authors(tiny):
    """What their train.py saves, of the reference's small network; its args say the heads, as forks' do."""
    ema = tiny.state_dict()
    model = {name: tensor + 1 for name, tensor in ema.items()}
    opt = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    for _ in range(3):
        opt.param_groups[0]["params"][0].grad = torch.ones(2)
        opt.step()
    args = argparse.Namespace(num_heads=4, num_classes=10, path_type="GVP", prediction="score", loss_weight=None)
    return {"model": model, "ema": ema, "opt": opt.state_dict(), "args": args}


def save(content, path: Path) -> str:
    torch.save(content, path)
    return str(path)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("SiT-S/8", {}),
        ("SiT-B/4", {"depth": 1, "input_size": 64}),
        ("SiT-S/2", {"depth": 1, "learn_sigma": False}),
        ("LightningDiT-B/1", {"depth": 1, "input_size": 4}),
        ("LightningDiT-L/1", {"depth": 1, "input_size": 4, "qk_norm": True}),
    ],
)
def test_a_released_file_is_read_and_its_network_is_told_from_its_shapes(tmp_path, name, overrides):
    network = build_sit(name, **overrides)
    for block in network.blocks:  # which start as the identity, whatever the heads
        torch.nn.init.normal_(block.adaLN_modulation[-1].weight, std=0.1)
    torch.nn.init.normal_(network.final_layer.linear.weight)
    released = load_checkpoint(save(network.state_dict(), tmp_path / "SiT.pt"))
    assert same(released.weights, network.state_dict())
    assert (released.which, released.step) == ("ema", 0)
    ours = released.record.build_network()
    ours.load_state_dict(released.weights, strict=True)
    assert (ours.null_label, ours.learn_sigma, ours.input_size) == (1000, network.learn_sigma, network.input_size)
    x, t, y = torch.randn(1, 4, ours.input_size, ours.input_size), torch.tensor([0.3]), torch.tensor([207])
    assert torch.equal(ours.eval()(x, t, y), network.eval()(x, t, y))  # which it isn't with another number of heads
    transport = released.record.build_transport()
    assert (transport.path_type, transport.prediction) == ("Linear", "velocity")
    assert released.record.autoencoder == AutoencoderSpec("stabilityai/sd-vae-ft-ema", 4, 8, 0.18215, 0.0)
    assert released.record.classes[::999] == ["0", "999"]


def test_a_lightningdit_of_its_own_autoencoder_is_told_how_to_load_it(tmp_path):
    network = build_sit("LightningDiT-B/1", depth=1, input_size=4, in_channels=32)
    file = save({"ema": network.state_dict(), "config": {}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"got 32 channels.*; give the spec.json of shards of its latents"):
        load_checkpoint(file)


@pytest.mark.parametrize("option", ["in_context_posemb", "adaLN_modulation.1.weight", "feat_rope_incontext.freqs_cos"])
def test_weights_of_another_family_are_one_line(authors, tmp_path, option):
    file = save(authors | {"ema": authors["ema"] | {option: torch.ones(1)}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=f"a.pt: not the weights of a SiT: it has {option}, which a SiT has not"):
        load_checkpoint(file)


def test_a_released_file_has_no_training_weights(tmp_path):
    with pytest.raises(NoSuchWeights, match="no training weights"):
        load_checkpoint(save(build_sit("SiT-S/8", depth=1).state_dict(), tmp_path / "SiT.pt"), "training")


def test_the_authors_training_checkpoint_has_both_kinds_and_its_args_count(authors, reference, tmp_path):
    path = save(authors, tmp_path / "0000003.pt")
    ema, training = load_checkpoint(path), load_checkpoint(path, "training")
    assert same(ema.weights, authors["ema"])
    assert same(training.weights, authors["model"])
    assert ema.step == 3
    assert (ema.record.transport["path_type"], ema.record.transport["prediction"]) == ("GVP", "score")
    network = SiT.from_pretrained(path)
    io = reference("tiny_a.io")
    with torch.no_grad():
        torch.testing.assert_close(network(io["x"], io["t"], io["y"]), io["forward"], rtol=1e-4, atol=1e-5)


def test_the_eps_of_the_authors_arguments_counts_where_it_counts_in_their_code(authors, tmp_path):
    vars(authors["args"]).update(train_eps=1e-5, sample_eps=1e-3, path_type="GVP", prediction="score")
    record = load_checkpoint(save(authors, tmp_path / "a.pt")).record
    assert (record.transport["train_eps"], record.transport["sample_eps"]) == (1e-5, 1e-3)
    authors["args"].prediction = "velocity"
    record = load_checkpoint(save(authors, tmp_path / "b.pt")).record
    transport = record.build_transport()
    assert transport.interval(eval=True) == transport.interval() == (0, 1)


def test_without_a_row_more_than_classes_there_is_no_null_class(authors, tmp_path):
    authors["args"].num_classes = 11
    network = load_checkpoint(save(authors, tmp_path / "a.pt")).record.build_network()
    assert (network.num_classes, network.null_label) == (11, None)


def prefixed(weights: dict, prefix: str = "", per_block: str = "") -> dict:
    return {prefix + re.sub(r"^(blocks\.\d+\.)", rf"\1{per_block}", name): value for name, value in weights.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: prefixed(w, "module."),  # DDP
        lambda w: prefixed(w, "_orig_mod."),  # torch.compile
        lambda w: prefixed(w, "module._orig_mod."),
        lambda w: prefixed(w, "_orig_mod.module.", "_checkpoint_wrapped_module."),
        lambda w: prefixed(w, per_block="_orig_mod."),  # each block compiled by itself
        lambda w: prefixed(w, "_fsdp_wrapped_module.", "_fsdp_wrapped_module._orig_mod."),
        lambda w: {"n_averaged": torch.tensor(3)} | prefixed(w, "module."),  # torch's AveragedModel
        lambda w: prefixed(w, "model."),  # Lightning
        lambda w: prefixed(w, "model._orig_mod.net."),
    ],
)
def test_the_prefixes_of_wrapped_networks_are_taken_off(authors, tmp_path, wrap):
    both = {name: wrap(authors[name]) for name in ("model", "ema")}
    path = save(authors | both, tmp_path / "a.pt")
    for which, name in (("training", "model"), ("ema", "ema")):
        assert same(load_checkpoint(path, which).weights, authors[name])


@pytest.mark.parametrize(
    ("content", "has"),
    [
        (lambda model, ema: ema, {"ema": "ema"}),
        (lambda model, ema: {"state_dict": ema, "epoch": 3}, {"ema": "ema"}),
        (lambda model, ema: {"ema": ema}, {"ema": "ema"}),
        (lambda model, ema: {"module": ema, "step": 3}, {"ema": "ema"}),
        (lambda model, ema: {"model": None, "ema": ema}, {"ema": "ema"}),
        (lambda model, ema: {"model_state_dict": model}, {"training": "model"}),
        (lambda model, ema: {"model_state_dict": model, "ema_state_dict": ema}, {"training": "model", "ema": "ema"}),
        (lambda model, ema: {"state_dict": model, "state_dict_ema": ema}, {"training": "model", "ema": "ema"}),
    ],
)
def test_weights_are_found_under_the_names_that_others_use(authors, tmp_path, content, has):
    args = {"args": authors["args"]}
    held = content(authors["model"], authors["ema"])
    authors["ema"]["x_embedder.proj.weight"] += 1  # neither is the other
    path = save(held | args if "pos_embed" not in held else {"ema": held} | args, tmp_path / "a.pt")
    for which in ("training", "ema"):
        if which in has:
            assert same(load_checkpoint(path, which).weights, authors[has[which]])
        else:
            with pytest.raises(NoSuchWeights, match=f"no {which} weights, only the .* ones; ask for those"):
                load_checkpoint(path, which)


def test_a_name_with_and_without_a_prefix_is_ambiguous(authors, tmp_path):
    path = save(authors["ema"] | prefixed(authors["model"], "module."), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of sit_composer's"):
        load_checkpoint(path)


def test_weights_in_torchs_old_format_and_in_one_safetensors_file_are_read(tmp_path):
    weights = build_sit("SiT-S/8", depth=1).state_dict()
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "SiT.safetensors")
    save_file(weights, tmp_path / "renamed.bin")
    for name in ("old.pt", "SiT.safetensors", "renamed.bin"):
        assert same(load_checkpoint(str(tmp_path / name)).weights, weights)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2700000000\n"


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, "not a checkpoint, but a Git LFS pointer to one; fetch it by `git lfs pull`"),
        (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "not a checkpoint, but a web page; download"),
        (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "not a checkpoint, but a web page; download"),
        (b"", "not a checkpoint, but an empty file"),
        (b'{"error": "Invalid username or password."}', "checkpoint|damaged"),
        (bytes(range(256)) * 4, "checkpoint|damaged"),
        (bytes(4096), r"a damaged one$|invalid JSON"),  # torch's advice is to run what is in it
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "damaged"),  # the head of torch's old format
    ],
)
def test_what_came_in_a_checkpoints_place_is_told(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(str(tmp_path / name))
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_truncated_file_is_told(tmp_path, new_format):
    path = tmp_path / "a.pt"
    torch.save({"ema": {"x": torch.ones(1000)}}, path, _use_new_zipfile_serialization=new_format)
    whole = path.read_bytes()
    for keep in (1, 5, 30, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=f"^{path}: not a checkpoint") as caught:
            load_checkpoint(str(path))
        assert "\n" not in str(caught.value)


def change(**tensors):
    def changed(authors):
        for name, tensor in tensors.items():
            authors["ema"][name.replace("__", ".")] = tensor
        return authors

    return changed


def without(part: str, name: str):
    def changed(authors):
        return authors | {part: {key: value for key, value in authors[part].items() if key != name}}

    return changed


def with_args(**args):
    return lambda authors: authors | {"args": argparse.Namespace(num_heads=4, **args)}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda a: a["ema"], "the number of attention heads is unknown: got width 64, expected one of 384, 768"),
        (lambda a: {"model": a["model"], "args": a["args"]}, "no ema weights"),
        (without("ema", "pos_embed"), "not the weights of a SiT: 'pos_embed' is missing"),
        (without("ema", "blocks.1.attn.proj.bias"), "not the weights of a SiT: blocks.1.attn.proj.bias is missing"),
        (change(projector__weight=torch.ones(1)), "it has projector.weight, which a SiT has not"),
        (change(pos_embed=torch.ones(1, 15, 64)), "pos_embed: got shape (1, 15, 64), expected (1, 9, 64)"),
        (change(pos_embed=torch.ones(64)), "not the weights of a SiT: tuple index out of range"),
        (
            change(t_embedder__mlp__0__bias=torch.tensor([0.0] * 63 + [float("nan")])),
            "t_embedder.mlp.0.bias has values",
        ),
        (change(t_embedder__mlp__0__bias=torch.full((64,), -torch.inf)), "t_embedder.mlp.0.bias has values"),
        (with_args(num_classes=5), "embedding_table.weight: got shape (11, 64), expected (6, 64)"),
        (with_args(num_classes="ten"), "not the weights of a SiT"),
        (with_args(prediction="v"), "transport: prediction: got 'v', expected velocity, noise, score"),
        (with_args(path_type=3), "transport: path_type: got 3"),
        (lambda a: a | {"args": argparse.Namespace(num_heads=0)}, "not the weights of a SiT"),
    ],
)
def test_what_is_not_quite_an_authors_file_is_refused_in_a_line(authors, tmp_path, broken, message):
    path = save(broken(authors), tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_network_of_other_latents_than_the_authors_is_not_given_their_autoencoder(tmp_path):
    path = save(build_sit("SiT-S/8", depth=1, in_channels=1).state_dict(), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="got 1 channels, expected the 4 of the authors' autoencoder"):
        load_checkpoint(path)


class Planted:
    def __reduce__(self):
        return (open, (os.environ["PLANTED"], "w"))


@pytest.mark.parametrize("where", ["args", "args.x", "ema"])
def test_nothing_that_is_planted_in_an_authors_file_runs(authors, tmp_path, monkeypatch, where):
    monkeypatch.setenv("PLANTED", str(tmp_path / "planted"))
    if where == "args.x":
        authors["args"].x = Planted()
    else:
        authors[where] = Planted()
    with pytest.raises(CheckpointError, match="without running code in it"):
        load_checkpoint(save(authors, tmp_path / "a.pt"))
    assert not (tmp_path / "planted").exists()


# --- Exported folders ---


@pytest.fixture
def exported(tmp_path, tiny) -> Path:
    """A folder as for the Hub, written by hand."""
    folder = tmp_path / "exported"
    folder.mkdir()
    config = {
        **FORMAT,
        "weights": {"ema": "model.safetensors"},
        "trained": {"step": 7, "epoch": 1, "samples": 70},
        "model": TINY,
        "transport": TRANSPORT,
        "autoencoder": {"name": None, "channels": 4},
        "classes": list("abcdefghij"),
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tiny.state_dict(), folder / "model.safetensors")
    return folder


def test_an_exported_folder_is_read_as_its_config_says(exported, tiny):
    checkpoint = load_checkpoint(str(exported))
    assert same(checkpoint.weights, tiny.state_dict())
    assert (checkpoint.step, checkpoint.epoch, checkpoint.samples) == (7, 1, 70)
    assert checkpoint.path == str(exported / "model.safetensors")
    assert checkpoint.record == Record(TINY, TRANSPORT, AutoencoderSpec(None, 4), list("abcdefghij"))
    with pytest.raises(NoSuchWeights, match="no training weights; ask for the ema ones"):
        load_checkpoint(str(exported), "training")


def test_a_file_of_an_exported_folder_is_not_read_without_the_record_beside_it(exported, tiny):
    save(tiny.state_dict(), exported / "ema.pt")
    for name in ("ema.pt", "model.safetensors"):
        with pytest.raises(CheckpointError, match="part of an exported folder; give the folder"):
            load_checkpoint(str(exported / name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "diffusers"}, "sit_composer.export didn't write it"),
        ({"version": "2"}, "version: got '2', expected a whole number from 1 to 1"),
        (
            {"weights": {"ema": "../model.safetensors"}},
            "ema weights: got '../model.safetensors', expected model",
        ),
        ({"weights": {"ema": "ema.safetensors"}}, "ema.safetensors: missing or damaged"),
        ({"weights": None}, "not an export's"),
        ({"trained": {}}, "not an export's: 'step'"),
        ({"model": {"width": 3}}, "model: "),
        ({"model": TINY | {"num_heads": 7}}, "model: hidden_size: got 64, expected a multiple of num_heads (7)"),
        ({"model": TINY | {"depth": 3}}, "blocks.2.attn.qkv.weight is missing"),
        ({"transport": {"path_type": "linear"}}, "transport: path_type: got 'linear'"),
        ({"autoencoder": {"name": None}}, "autoencoder: "),
        ({"classes": ["one"]}, "classes: expected 10 names"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(exported, changes, message):
    config = exported / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(exported))
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(exported))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"{", b"\xff\xfe"])
def test_a_config_that_is_none_is_named(exported, content):
    (exported / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config.json: not an export's"):
        load_checkpoint(str(exported))


@pytest.mark.parametrize("keep", [1, 7, 200, -1])
def test_truncated_safetensors_are_named(exported, keep):
    file = exported / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors: missing or damaged"):
        load_checkpoint(str(exported))


def test_an_exported_folder_that_was_cloned_without_its_large_files_is_told(exported):
    (exported / "model.safetensors").write_bytes(LFS)
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a checkpoint, but a Git LFS pointer"):
        load_checkpoint(str(exported))


def test_values_that_are_not_finite_are_named_in_an_exported_folder_too(exported, tiny):
    weights = tiny.state_dict()
    weights["blocks.1.mlp.fc2.bias"][3] = torch.nan
    save_file(weights, exported / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks.1.mlp.fc2.bias has values that are NaN or infinite"):
        load_checkpoint(str(exported))


# --- Where it is ---


def test_what_is_elsewhere_or_incomplete_is_refused(tmp_path):
    with pytest.raises(StorageError, match="ftp://: an unknown object store, expected s3://, gs://, az://"):
        load_checkpoint("ftp://server/run")
    (tmp_path / "ep0-ba2").mkdir()
    (tmp_path / "ep0-ba2" / ".metadata").write_bytes(b"")
    (tmp_path / "latest-rank0.pt").symlink_to("ep0-ba2")
    with pytest.raises(CheckpointError, match=r"no complete checkpoint here$"):
        load_checkpoint(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=rf"here; did you mean {tmp_path}/checkpoints\?$"):
        load_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"ep0-ba2/.metadata: not a sharded checkpoint's metadata"):
        load_checkpoint(str(tmp_path / "ep0-ba2"))


def test_a_network_comes_from_the_hub_by_its_name(exported, tiny, tmp_path, monkeypatch):
    """From the Hub's own cache, laid out as huggingface_hub does, so that no network is needed."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    cached, commit = tmp_path / "cache" / "models--someone--sit", "0" * 40
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots").mkdir()
    exported.rename(cached / "snapshots" / commit)
    network = SiT.from_pretrained("someone/sit")
    assert not network.training
    assert same(network.state_dict(), tiny.state_dict())
    with pytest.raises(CheckpointError, match="someone/else: no such folder, and not from the Hub either: "):
        fetch("someone/else")
    with pytest.raises(CheckpointError, match=r"/no/such/folder: no checkpoint here"):
        SiT.from_pretrained("/no/such/folder")


def test_of_a_run_whose_newest_checkpoint_is_damaged_the_one_before_is_taken_with_a_word(tmp_path, capsys):
    for name in ("ep0-ba4-rank0.pt", "ep1-ba8-rank0.pt"):
        shutil.copy(REFERENCE / "earlier" / "run" / name, tmp_path)
    (tmp_path / "ep1-ba9-rank0.pt").write_bytes(b"half")
    assert load_checkpoint(str(tmp_path)).step == 8
    told = "note: ep1-ba9-rank0.pt: not complete, or damaged; ep1-ba8-rank0.pt is taken\n"
    assert capsys.readouterr().err == told
