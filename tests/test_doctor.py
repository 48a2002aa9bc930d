"""The doctor: each check on a fault that the test makes, its lines, limits of time, exit codes, and two ranks."""

import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import reset_sessions
from torch.nn.attention import SDPBackend, sdpa_kernel

from sit_composer import doctor, probes
from sit_composer.config.load import load_config
from sit_composer.data.spec import DataSpec
from sit_composer.errors import UserError
from tests.helpers.fault_proxy import Fault, FaultProxy
from tests.helpers.paths import ROOT
from tests.helpers.s3 import free_ports

XL = ["data.local=/tmp/x", "data.remote=s3://sit/shards", "trainer.save_folder=s3://sit/runs/{run_name}"]
CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
WAITS = """
import sys, time
from sit_composer import doctor

def probe():
    try:
        print("ready", flush=True)
        time.sleep(0.5)
        return "ok", "done"
    finally:
        open(sys.argv[1], "w").close()  # as a store's probe is removed

doctor.examine = lambda config: doctor.bounded(probe, "", 60) and time.sleep(60)
sys.exit(doctor.main([]))
"""
LOCKED = """
import ctypes
from sit_composer import doctor

doctor.LOCKED = 1
doctor.bounded(lambda: ctypes.PyDLL(None).sleep(60), "", 1)  # PyDLL keeps Python's lock
"""


def xl(*overrides):
    return load_config(str(ROOT / "yamls/sit_xl_2.yaml"), [*XL, *overrides])


# --- The command ---


def test_a_check_that_fails_or_gives_no_answer_is_told_with_what_to_do():
    assert doctor.bounded(lambda: ("ok", "fine"), "nothing", 5) == ("ok", "fine")
    started = time.monotonic()
    assert doctor.bounded(lambda: time.sleep(60), "wait", 0.1) == ("failed", "no answer within 0.1 s", "wait")
    assert time.monotonic() - started < 5
    assert doctor.bounded(lambda: 1 / 0, "count", 5) == ("failed", "ZeroDivisionError: division by zero", "count")


def test_a_library_that_never_returns_ends_the_process_and_ctrl_c_waits_for_the_cleaning_up(tmp_path):
    run = functools.partial(subprocess.Popen, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    locked, waits = run([sys.executable, "-c", LOCKED]), run([sys.executable, "-c", WAITS, str(tmp_path / "removed")])
    assert waits.stdout.readline() == "ready\n"
    waits.send_signal(signal.SIGINT)
    assert waits.communicate(timeout=30)[1] == "\nstopped\n"
    assert (waits.returncode, (tmp_path / "removed").exists()) == (130, True)
    errors = locked.communicate(timeout=30)[1]
    assert (locked.returncode, "Timeout" in errors, "bounded" in errors) == (1, True, True)


def test_a_mistake_in_the_command_or_the_yaml_is_usage(capsys):
    assert doctor.main(["nowhere.yaml"]) == 2
    assert doctor.main(["yamls/quickstart.yaml", "precision=fp8"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "nowhere.yaml: can't be read" in err
    assert "precision: got" in err


def test_this_machine_is_examined_and_a_secret_is_not_printed(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_TOKEN", "hunter2hunter2")
    monkeypatch.setattr(probes, "WRITTEN", 2**22)
    folder = tmp_path / "hunter2hunter2"
    config = [str(ROOT / "yamls/quickstart.yaml"), f"data.local={tmp_path}", f"trainer.save_folder={folder}/runs"]
    folder.write_text("a file in the way")
    for code in (1, 0):
        assert doctor.main(config) == code
        out = capsys.readouterr().out
        lines = {line[2:26].strip(): line[27:] for line in out.splitlines() if line.startswith("  ")}
        names = ("packages", "launcher", "open files", "shared memory", "torch", "bfloat16", "flash attention")
        assert all(lines[name].startswith(("ok", "warning")) for name in (*names, "disk TMPDIR")), out
        assert "hunter2" not in out
        assert lines["ranks"].startswith("not checked: there is one rank")
        if code:
            assert "$SOME_TOKEN" in out
            fault = "is a file, expected a folder; delete it, or choose another folder"
            assert re.fullmatch(f"failed: .* {fault}", lines["disk of checkpoints"])
            assert re.fullmatch(r"(\d+ warning, )?\d+ ok, (.*, )?1 failed(, .*)?", out.splitlines()[-1])
            folder.unlink()
        else:
            assert "a checkpoint has" in lines["disk of checkpoints"]
    monkeypatch.setenv("LOCAL_RANK", "1")  # which makes only the checks of its GPU and of what is between ranks
    assert doctor.main([]) == 0
    assert capsys.readouterr().out == ""


# --- Python, the loader's needs, disks ---


def test_packages_and_python_are_compared_with_what_the_project_requires():
    assert doctor.packages(["packaging>=1", "torch==2.*", "Python>=3.11", "gradio<0; extra == 'demo'"])[0] == "ok"
    status, text, advice = doctor.packages(["packaging==1.0", "torch==2.9.1", "nowhere-to-be-found>=2", "Python<3"])
    assert (status, advice) == ("failed", doctor.INSTALL)
    assert re.fullmatch(
        "packaging: got .*, expected ==1.0; torch: got .*, expected ==2.9.1; "
        "nowhere-to-be-found: got none, expected >=2; Python: got .*, expected <3",
        text,
    )
    assert doctor.packages(["torch==2.9.1"])[0] == "warning"


def test_mosaicmls_own_launcher_is_told_from_this_one(tmp_path):
    assert doctor.launcher(Path(sys.executable).with_name("composer"))[0] == "ok"
    assert doctor.launcher(tmp_path / "composer")[0] == "warning"
    (tmp_path / "composer").write_text("from composer.cli import launcher")
    assert "--force-reinstall" in doctor.launcher(tmp_path / "composer")[2]


def test_a_low_limit_of_open_files_fails_and_says_which_one_is_needed(monkeypatch):
    needed = 256 + 8 * 8 + 256
    for soft, hard, advice in (
        (needed, needed, None),
        (-1, -1, None),
        (needed - 1, needed, f"raise the limit: ulimit -n {needed}"),
        (200, 200, "have the hard limit raised (limits.conf)"),
    ):
        monkeypatch.setattr(doctor.resource, "getrlimit", lambda _, limits=(soft, hard): limits)
        found = doctor.files(None)
        if advice is None:
            assert found[0] == "ok"
        else:
            assert found == ("failed", f"a process may open {soft}, expected at least {needed}", advice)


def test_shared_memory_is_compared_with_what_loaders_need(disk, monkeypatch):
    assert doctor.shared(str(disk.path), 2**20)[0] == "ok"
    assert doctor.shared(str(disk.path), 3 * 2**20)[0] == "warning"
    assert doctor.shared(str(disk.path), 0)[0] == "warning"
    status, text, advice = doctor.shared(str(disk.path), 2**30)
    assert (status, "the loader needs 1" in text, "--shm-size" in advice) == ("failed", True, True)
    disk.fill(0)
    with pytest.raises(OSError, match="No space"):
        doctor.shared(str(disk.path), 1)
    config = xl("data.num_workers=2", "data.global_batch_size=16")
    elsewhere = 2 * 4 * 16 * 3 * 256**2  # workers, places, samples, and an image
    assert (doctor.shared_need(config), doctor.shared_need(None)) == (elsewhere, 0)
    for name, value in (("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert doctor.shared_need(config) == elsewhere / 2
    shards = {"kind": "latents", "channels": 4, "image_size": 256, "num_classes": 1, "classes": ["a"], "samples": 9}
    monkeypatch.setattr(doctor, "local_spec", lambda *_: DataSpec(**shards, class_counts=[9]))
    assert doctor.shared_need(config) == 2 * 4 * 16 * 2 * 8 * 32**2 / 2  # float16 means and deviations


def test_a_disk_is_written_to_and_left_as_it_was_or_says_what_it_lacks(disk, tmp_path):
    small = str(disk.path)
    before = sorted(tmp_path.iterdir())
    found = probes.disk(str(tmp_path / "runs" / "first"))
    assert found[0] == "ok"
    assert re.search(rf"GiB free in {tmp_path}, \S+ MB/s written and synced", found[1])
    assert sorted(tmp_path.iterdir()) == before
    checkpoints = {size: probes.disk(small, size * 2**20, 1000)[0] for size in (0, 1, 3, 5)}
    assert checkpoints == {0: "warning", 1: "ok", 3: "warning", 5: "failed"}
    slow = probes.disk(small, 2**20, 1e-9)
    assert (slow[0], "supervision.grace" in slow[2]) == ("warning", True)
    disk.fill(0)
    with pytest.raises(OSError, match="No space left on device"):
        probes.disk(small)


# --- The device and ranks ---


@CPU
def test_without_a_gpu_the_same_is_checked_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "DRIVER", tmp_path / "version")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probes.gpu()[0] == "not checked"
    (tmp_path / "version").write_text("NVRM version: 570")  # a driver, and torch can't use it
    with pytest.raises((RuntimeError, AssertionError)):
        probes.gpu()


def test_a_gpu_is_named_with_its_driver_and_one_that_is_taken_or_missing_is_told(monkeypatch):
    """What CUDA answers is given, as for one free GPU of 80 GiB; it isn't there."""
    monkeypatch.setattr(probes, "run_shell", lambda _: (0, "driver_version\n570.1", ""))
    answers = {"is_available": True, "device_count": 1, "set_device": None, "get_device_name": "H100"}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    for free, status in ((79, "ok"), (60, "warning")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free * 2**30, 80 * 2**30))
        found = probes.gpu()
        assert found[0] == status
        assert found[1].startswith(f"H100, {free} of 80 GiB free; 1 on this node; driver ")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert probes.gpu()[0] == "failed"


@CPU
def test_bfloat16_is_computed_and_a_runs_precision_is_resolved(monkeypatch):
    assert probes.bfloat16("auto")[0] == "ok"
    assert probes.bfloat16("auto")[1].endswith("here")
    with pytest.raises(UserError, match="there is no GPU here"):
        probes.bfloat16("amp_bf16")
    # A faulty device, but for float64, the reference.
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: torch.matmul(a, b).roll(int(a.dtype == torch.float32)))
    assert probes.bfloat16("fp32")[0] == "failed"


def test_flash_attention_is_called_and_compared(monkeypatch):
    assert probes.flash_attention()[0] == "ok"
    attend = probes.attend
    for wrong in (lambda x: x * 1.1, lambda x: x + (0.1 * (x - x.detach()))):  # its result, and only its gradient
        calls = iter((wrong, lambda x: x))
        monkeypatch.setattr(probes, "attend", lambda q, k, v, calls=calls: next(calls)(attend(q, k, v)))
        assert probes.flash_attention()[0] == "failed"


@CPU
def test_a_kernel_that_does_not_run_is_a_warning(monkeypatch):
    no_kernel = SDPBackend.CUDNN_ATTENTION  # which no CPU has
    monkeypatch.setattr(probes, "sdpa_kernel", lambda _: sdpa_kernel(no_kernel))
    found = probes.flash_attention()
    assert (found[0], "slower kernel" in found[2]) == ("warning", True)


FAULTY = """
import os, sys
if os.environ.get("RANK") == "1" and os.environ.get("FAULT"):
    import torch
    if os.environ["FAULT"] == "device":
        torch.Tensor.__matmul__ = lambda a, b: torch.matmul(a, b).roll(int(a.dtype == torch.float32))
    else:  # a network that loses a number
        import torch.distributed
        right = torch.distributed.all_reduce
        torch.distributed.all_reduce = lambda x: (right(x), x[-1:].zero_())
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["", "device", "network"])
def test_two_ranks_sum_and_tell_what_failed_on_the_other(tmp_path, fault):
    """The second rank alone is given a failure: the first one, whose output is seen, tells it."""
    (tmp_path / "sitecustomize.py").write_text(FAULTY)
    command = [str(Path(sys.executable).with_name("composer")), "-n", "2", "-m", "sit_composer.doctor"]
    changes = {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path), "FAULT": fault}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | changes, capture_output=True, text=True, timeout=300)
    line = re.search(r"^  ranks +(.*)$", done.stdout, re.MULTILINE)[1]
    told = {
        "": r"ok: gloo between 2 ranks on \S+: \S+ GB/s for 17 MB",
        "device": r"failed: rank 1, \S+: bfloat16: a product of matrices is wrong: .*",
        "network": r"failed: rank 1, \S+: gloo summed \{0\.0, 3\.0\}, expected 3",
    }
    assert re.fullmatch(told[fault], line), line
    assert done.returncode == (1 if fault else 0), done.stdout + done.stderr


@pytest.mark.slow
def test_a_rank_that_never_comes_is_waited_for_no_longer_than_the_limit():
    code = "from sit_composer import probes; probes.MEETING = 3.0; print(probes.ranks([]))"
    names = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | names, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    assert "1/2 clients joined" in done.stderr


# --- Stores and the Hub: on SeaweedFS, on closed ports, and on servers with another clock ---


@pytest.fixture
def made():
    """Makes the checks of a config: {name: finding}."""

    def run(*overrides):
        found = {}

        def make(name, check, advice, seconds=60):
            found[name] = doctor.bounded(check, advice, seconds)
            return found[name][0]

        probes.check_run(make, xl(*overrides))
        return found

    return run


@pytest.fixture
def server(monkeypatch):
    """Starts a store on loopback that answers with a status and a clock that is so many seconds ahead: its URL."""
    started = []

    def start(status, ahead):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response_only(status)
                self.send_header("Date", formatdate(time.time() + ahead, usegmt=True))
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        started.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=started[-1].serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("S3_ENDPOINT_URL", url := f"http://127.0.0.1:{started[-1].server_port}")
        return url

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("ahead", "status"), [(0, "ok"), (-30, "ok"), (-300, "warning"), (600, "warning"), (1200, "failed")]
)
def test_the_clock_is_compared_with_the_stores_date(server, ahead, status):
    server(403, ahead)
    found = probes.clock()
    assert found[0] == status
    if ahead:
        assert ("behind" if ahead > 0 else "ahead of") in found[1]
    assert found[2:] == (() if status == "ok" else (probes.CLOCK,))


def test_a_closed_port_is_told_once_and_the_rest_isnt_waited_for(made, monkeypatch):
    monkeypatch.setenv("S3_ENDPOINT_URL", url := f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setattr(probes, "checkpoint_bytes", lambda _: 1)  # takes seconds
    found = made("autoencoder.name=null", "model.input_size=256")
    assert {name: finding[0] for name, finding in found.items() if not name.startswith("disk")} == {
        "S3 clock": "failed",
        "trainer.save_folder": "not checked",
    }
    assert re.fullmatch(rf"{url}: .*Connection refused", found["S3 clock"][1])
    assert found["S3 clock"][2] == probes.ENDPOINT
    assert {"disk data.local", "disk of checkpoints"} <= found.keys()


def test_a_repository_of_the_hub_is_allowed_refused_or_out_of_reach(server, monkeypatch, tmp_path):
    assert probes.hub_names(xl()) == {"autoencoder.name": "stabilityai/sd-vae-ft-ema"}
    teacher = "alignment={name: repa, teacher: 'timm:vit_base_patch14_dinov2.lvd142m'}"
    (tmp_path / "vae").mkdir()
    timm = {"alignment.teacher": "timm/vit_base_patch14_dinov2.lvd142m"}
    assert probes.hub_names(xl(teacher, f"autoencoder.name={tmp_path}/vae")) == timm
    other = "alignment={name: repa, teacher: 'transformers:facebook/dinov2-base'}"
    assert probes.hub_names(xl(other))["alignment.teacher"] == "facebook/dinov2-base"
    for name in ("me/weights", "hf://me/weights"):
        assert probes.hub_names(xl(f"init_from={name}"))["init_from"] == "me/weights"
    reset_sessions()  # that of an earlier test may be one of HF_HUB_OFFLINE

    def ask(url):
        monkeypatch.setattr(probes, "HfApi", lambda: huggingface_hub.HfApi(endpoint=url, token=False))
        return probes.hub("somebody/vae")

    assert ask(server(200, 0))[0] == "ok"
    refused = ask(server(403, 0))
    assert (refused[0], "HF_TOKEN" in refused[2]) == ("failed", True)
    assert ask(nowhere := f"http://127.0.0.1:{free_ports(1)[0]}")[0] == "failed"
    monkeypatch.setattr(probes, "try_to_load_from_cache", lambda name, file: file)
    assert ask(nowhere)[0] == "ok"


class Unconditional(FaultProxy):
    """A store without conditional writes: it refuses the first request of each two."""

    puts = 0

    def happens_to(self, request):
        if request.startswith("PUT") and request.endswith("lease"):
            self.puts += 1
            return Fault("501") if self.puts % 2 else None
        return super().happens_to(request)


@pytest.mark.parametrize(
    ("method", "result", "words"),
    [("read", b"2", "read b'2'"), ("listing", {}, "listed {}"), ("delete", None, "1} after deleting")],
)
def test_a_store_that_answers_wrongly_fails(tmp_path, monkeypatch, method, result, words):
    """A folder stands for the store, whose one method does nothing, or answers with something else."""
    folder = probes.open_run_folder(str(tmp_path / "runs"))
    monkeypatch.setattr(folder, method, lambda *_: result)
    monkeypatch.setattr(probes, "open_run_folder", lambda _: folder)
    found = probes.written("gs://bucket/runs")
    assert (found[0], words in found[1]) == ("failed", True), found


@pytest.mark.slow
def test_a_real_store_is_written_conditionally_and_left_as_it_was(s3, made, monkeypatch):
    monkeypatch.setattr(probes, "checkpoint_bytes", lambda _: 1)  # takes seconds
    before = s3.keys("runs")
    found = made()
    assert found["trainer.save_folder"][0] == "ok", found
    assert found["S3 clock"][0] == "ok"
    assert s3.keys("runs") == before == []

    missing = made("trainer.save_folder=s3://nowhere/runs")["trainer.save_folder"]
    assert missing[0] == "failed"
    assert missing[1].startswith("list: s3://nowhere/runs")
    assert "nowhere" not in [bucket["Name"] for bucket in s3.client.list_buckets()["Buckets"]]

    with Unconditional(s3.url) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
        found = made()["trainer.save_folder"]
        assert (found[0], "no conditional writes" in found[1]) == ("warning", True)
        assert s3.keys("runs") == []
        for step, request in (("write", "PUT .*object"), ("read", "GET .*object"), ("delete", "DELETE .*object")):
            proxy.fault("403", request)
            refused = made()["trainer.save_folder"]
            assert refused[1].startswith(f"{step}: s3://sit/runs/")
            assert ("stays there" in refused[1]) == (step == "delete")
            assert "s3:ListBucket" in refused[2]
            assert (s3.keys("runs") != []) == (step == "delete")
            proxy.heal()
    monkeypatch.setenv("S3_ENDPOINT_URL", s3.url)

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "notthesecret")
    wrong = made()
    assert wrong["S3 clock"][0] == "ok"
    assert wrong["trainer.save_folder"][0] == "failed"
    assert "SignatureDoesNotMatch" in wrong["trainer.save_folder"][1]
    assert "notthesecret" not in "".join(map(str, wrong.values()))
