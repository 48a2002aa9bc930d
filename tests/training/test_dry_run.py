"""`--dry-run` tells what a run would be and what is missing, and leaves nothing behind."""

import re

import pytest

from sit_composer.config.checks import check
from sit_composer.config.load import load_config
from sit_composer.training import dry_run
from tests.helpers.paths import ROOT


@pytest.fixture
def dry(digits_shards, tmp_path, capsys):
    """Runs it on the quickstart's config with overrides; gives (exit code, output)."""

    def run(*overrides: str) -> tuple[int, str]:
        own = [f"data.local={digits_shards}", f"trainer.save_folder={tmp_path}/runs/{{run_name}}"]
        config = load_config(str(ROOT / "yamls/quickstart.yaml"), [*own, *overrides])
        if not any(override.startswith("callbacks=") for override in overrides):
            config.callbacks = {}  # to make one, Composer is imported
        config.scheduler = {}
        check(config)
        capsys.readouterr()
        return dry_run.run(config), capsys.readouterr().out

    return run


def line(out: str, name: str) -> str:
    """The line of a check."""
    return next(row for row in out.partition("checks:")[2].splitlines() if row.strip().startswith(name))


def test_a_run_that_could_start_is_told_and_nothing_is_left(dry, tmp_path):
    code, out = dry("run_name=first")
    assert code == 0, out
    assert "1,797 pixels of 8², 10 classes" in out
    assert "800 batches, 28.49 epochs" in out
    assert "4 in all" in out
    assert f"{tmp_path}/runs/first" in out
    assert "| microbatch |" in out
    assert "ok: 1,797 samples in 1 shard" in line(out, "data")
    assert "ok" in line(out, "trainer.save_folder")
    assert "failed" not in out
    assert not (tmp_path / "runs").exists()


def test_several_averages_are_named_and_counted(dry):
    _, plain = dry()
    _, out = dry("ema.power=[0.05, 0.1]")
    assert "averages:    0.99, power0.05, power0.1; evaluation and sampling in training use 0.99" in out
    assert "averages:" not in plain
    sizes = [float(re.search(r"^checkpoints: (\S+) GB", text, re.MULTILINE)[1]) for text in (plain, out)]
    assert sizes[1] == pytest.approx(sizes[0] * 6 / 4, rel=1e-2)  # weights, two moments, and one or three averages


def test_all_faults_are_told_at_once(dry, tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    code, out = dry(
        f"data.local={tmp_path}/nothing", "precision=amp_bf16", "callbacks={speed_monitor: {window_size: 10}}"
    )
    assert code == 2
    assert "/nothing/spec.json: can't be read" in line(out, "data")
    assert "failed" in line(out, "trainer.save_folder")
    assert str(tmp_path / "runs") in line(out, "trainer.save_folder")
    assert "there is no GPU here" in line(out, "precision")
    assert "ok: speed_monitor" in line(out, "callbacks")


def test_a_broken_shard_is_found(dry, digits_shards, tmp_path):
    copy = tmp_path / "shards"
    copy.mkdir()
    for file in digits_shards.iterdir():
        content = bytearray(file.read_bytes())
        if file.suffix == ".mds":
            content[len(content) // 2] ^= 1
        (copy / file.name).write_bytes(content)
    code, out = dry(f"data.local={copy}")
    assert code == 2
    assert "has been changed" in line(out, "data")


def test_an_autoencoder_that_is_nowhere_is_found(dry, tmp_path, vae_folder):
    options = ("model.in_channels=4", "model.input_size=16", "data.image_size=32")
    code, out = dry(f"autoencoder.name={tmp_path}/no_vae", *options)
    assert code == 2
    assert "no autoencoder" in line(out, "autoencoder.name")
    code, out = dry(f"autoencoder.name={vae_folder}", *options)
    assert code == 0
    assert "ok" in line(out, "autoencoder.name")


def test_only_the_first_rank_does_it(dry, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert dry("data.local=nothing") == (0, "")


def test_s3_is_written_and_read_and_left_as_it_was(dry, s3, digits_shards, monkeypatch, tmp_path):
    for file in digits_shards.iterdir():
        s3.client.upload_file(str(file), "sit", f"shards/{file.name}")
    options = ("trainer.save_folder=s3://sit/runs/a", "data.remote=s3://sit/shards", f"data.local={tmp_path}/cache")
    code, out = dry(*options)
    assert code == 0, out
    assert "ok: wrote and deleted" in line(out, "trainer.save_folder")
    assert "s3://sit/shards/shard.00000.00000.mds" in line(out, "data")
    assert s3.keys("runs") == []
    assert not (tmp_path / "cache").exists()

    code, out = dry(*options[1:], "trainer.save_folder=s3://no-such-bucket/a")
    assert code == 2
    assert "bucket does not exist" in line(out, "trainer.save_folder")
    assert [bucket["Name"] for bucket in s3.client.list_buckets()["Buckets"]] == ["sit"]

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    code, out = dry(*options)
    assert code == 2
    assert "SignatureDoesNotMatch" in line(out, "trainer.save_folder")
    assert "failed" in line(out, "data")
    assert "a-wrong-secret" not in out
    assert s3.keys("runs") == []


def test_a_run_that_would_be_refused_for_its_earlier_checkpoints_is_told(dry, tmp_path):
    folder = tmp_path / "runs" / "quickstart"
    folder.mkdir(parents=True)
    (folder / "ep0-ba10-rank0.pt").write_bytes(b"half a checkpoint")
    code, out = dry("trainer.autoresume=false")
    assert code == 2
    assert "ep0-ba10-rank0.pt" in line(out, "earlier checkpoints")
    code, out = dry()
    assert code == 0
    assert "the run starts anew" in line(out, "earlier checkpoints")
    assert sorted(file.name for file in folder.iterdir()) == ["ep0-ba10-rank0.pt"]


def test_secrets_are_not_printed(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789")
    assert dry_run.hide("no user of key 0123456789") == "no user of key $WANDB_API_KEY"
