"""Format versions: files without one are of the first, and those of a newer sit_composer are refused in one line."""

import json

import pytest
import torch

from sit_composer import sample
from sit_composer.autoencoder import AutoencoderSpec
from sit_composer.callbacks.run_record import RunRecord
from sit_composer.checkpoint.load import load_checkpoint
from sit_composer.checkpoint.record import Record
from sit_composer.config.load import load_config
from sit_composer.config.same_run import check_same_config
from sit_composer.data.spec import DataSpec
from sit_composer.errors import NewerVersion, UserError, check_version
from sit_composer.evaluation.picture_sets import read_settings
from tests.helpers.runs import QUICKSTART

NEWER = r"written by a newer version of sit_composer \(format 2\), expected format 1 at most; update sit_composer$"
RECORD = Record({"hidden_size": 32, "depth": 1, "num_heads": 2, "num_classes": 1}, {}, AutoencoderSpec(None, 4), ["a"])
SPEC = DataSpec("pixels", 1, 8, 1, ["a"], [0], 0)


def test_a_version_is_a_whole_number_and_may_be_absent():
    check_version(None, 1, "file")
    check_version(1, 2, "file")
    for wrong in ("1", 0, True, 1.0):
        with pytest.raises(UserError, match=r"file: version: got .*, expected a whole number from 1 to 2"):
            check_version(wrong, 2, "file")


def test_a_newer_spec_is_refused():
    content = json.loads(SPEC.to_json())
    assert content.pop("version") == 1
    assert DataSpec.from_json(json.dumps(content), "spec.json") == SPEC
    with pytest.raises(NewerVersion, match=rf"^spec\.json: {NEWER}"):
        DataSpec.from_json(json.dumps({**content, "version": 2, "new": 1}), "spec.json")


def test_a_newer_config_is_refused_also_in_a_runs_folder(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("version: 2\nnew_key: 3\n")
    with pytest.raises(NewerVersion, match=rf"run\.yaml: {NEWER}"):
        load_config(str(file), [])
    config = load_config(QUICKSTART, [])
    assert config.version == 1
    with pytest.raises(NewerVersion, match=rf"^runs/a/config\.yaml: {NEWER}"):
        check_same_config(config, file.read_text(), "runs/a/config.yaml")


def test_a_newer_checkpoint_is_neither_read_nor_resumed(tmp_path):
    state = RunRecord(RECORD).state_dict()
    content = json.loads(state["record"])
    assert content["version"] == 1
    time = {"Timestamp": {"batch": 1, "epoch": 0, "sample": 1}}
    weights = {f"network.{name}": tensor for name, tensor in RECORD.build_network().state_dict().items()}

    def write(**changes) -> str:
        text = json.dumps({name: value for name, value in {**content, **changes}.items() if value is not None})
        held = {"callbacks": {"RunRecord": {"record": text}}, "timestamp": time, "model": weights}
        torch.save({"state": held}, tmp_path / "a.pt")
        return str(tmp_path / "a.pt")

    assert load_checkpoint(write(version=None), "training").step == 1
    with pytest.raises(NewerVersion, match=rf"a\.pt: {NEWER}"):
        load_checkpoint(write(version=2), "training")
    with pytest.raises(NewerVersion, match=rf"^the checkpoint: {NEWER}"):
        RunRecord(RECORD).load_state_dict({"record": json.dumps({"version": 2})})


def test_a_newer_export_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"format": "sit_composer", "version": 2, "new": 1}))
    assert sample.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "config.json: written by a newer version of sit_composer (format 2)" in capsys.readouterr().err


def test_newer_settings_of_generated_images_are_refused(tmp_path):
    settings = tmp_path / "sampling.json"
    settings.write_text(json.dumps({"version": 1, "cfg_scale": 1.0}))
    assert read_settings(tmp_path)["cfg_scale"] == 1.0
    settings.write_text(json.dumps({"version": 2}))
    with pytest.raises(NewerVersion, match=rf"sampling\.json: {NEWER}"):
        read_settings(tmp_path)
