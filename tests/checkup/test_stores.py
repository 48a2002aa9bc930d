"""Checks of stores and the Hub: on SeaweedFS, on closed ports, and on servers with another clock."""

import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest
from huggingface_hub.utils import reset_sessions

from sit_composer.checkup import stores
from sit_composer.checkup.finding import bounded
from sit_composer.config.load import load_config
from tests.helpers.fault_proxy import Fault, FaultProxy
from tests.helpers.paths import ROOT
from tests.helpers.s3 import free_ports

OWN = ["data.local=/tmp/x", "data.remote=s3://sit/shards", "trainer.save_folder=s3://sit/runs/{run_name}"]


@pytest.fixture
def made():
    """Makes the checks of a config: {name: finding}."""

    def run(*overrides):
        found = {}

        def make(name, seconds, check, advice):
            found[name] = bounded(check, seconds, advice)
            return found[name]

        stores.check_stores(make, load_config(str(ROOT / "yamls/sit_xl_2.yaml"), [*OWN, *overrides]))
        return found

    return run


@pytest.fixture
def server():
    """Starts a server on loopback that answers with a status and a clock that is so many seconds ahead: its URL."""
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
        return f"http://127.0.0.1:{started[-1].server_port}"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture
def no_credentials(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    return monkeypatch


@pytest.mark.parametrize(("ahead", "status"), [(0, "ok"), (-300, "warning"), (1200, "failed")])
def test_the_clock_is_compared_with_the_stores_date(server, ahead, status):
    found = stores.clock(server(403, ahead))
    assert found.status == status
    if ahead:
        assert ("behind" if ahead > 0 else "ahead of") in found.text
        assert "NTP" in found.advice


def test_a_closed_port_is_told_once_and_the_rest_isnt_waited_for(made, no_credentials):
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    no_credentials.setenv("S3_ENDPOINT_URL", url)
    found = made("autoencoder.name=null", "model.input_size=256")
    assert {name: finding.status for name, finding in found.items()} == {
        "S3 credentials": "failed",
        "S3 clock": "failed",
        "trainer.save_folder": "not checked",
        "data.remote": "not checked",
    }
    assert found["S3 credentials"].text == f"none found, for {url}"
    assert found["S3 clock"].text.startswith(f"{url}: ")
    assert "Connection refused" in found["S3 clock"].text


def test_the_hub_is_asked_only_for_what_a_run_loads_from_it(tmp_path):
    def names(*overrides):
        return stores.hub_names(load_config(str(ROOT / "yamls/sit_xl_2.yaml"), [*OWN, *overrides]))

    assert names() == {"autoencoder.name": "stabilityai/sd-vae-ft-ema"}
    (tmp_path / "vae").mkdir()
    assert names(f"autoencoder.name={tmp_path}/vae") == {}
    teacher = "alignment={name: repa, teacher: 'timm:vit_base_patch14_dinov2.lvd142m'}"
    assert names(teacher)["alignment.teacher"] == "timm/vit_base_patch14_dinov2.lvd142m"


def test_a_repository_of_the_hub_is_allowed_refused_or_out_of_reach(server, monkeypatch):
    reset_sessions()  # that of an earlier test may be one of HF_HUB_OFFLINE

    def ask(url):
        monkeypatch.setattr(stores, "HfApi", lambda: huggingface_hub.HfApi(endpoint=url, token=False))
        return stores.hub("somebody/vae")

    assert ask(server(200, 0)).status == "ok"
    refused = ask(server(403, 0))
    assert refused.status == "failed"
    assert "HF_TOKEN" in refused.advice
    assert ask(f"http://127.0.0.1:{free_ports(1)[0]}").status == "failed"


class Unconditional(FaultProxy):
    """A store without conditional writes: it refuses the first request of each two."""

    puts = 0

    def happens_to(self, request):
        if request.startswith("PUT") and request.endswith("lease"):
            self.puts += 1
            return Fault("501") if self.puts % 2 else None
        return super().happens_to(request)


@pytest.mark.slow
def test_a_real_store_is_written_conditionally_and_left_as_it_was(s3, made, monkeypatch):
    s3.client.put_object(Bucket="sit", Key="shards/index.json", Body=b"{}")
    before = s3.keys("runs") + s3.keys("shards")
    found = made()
    assert [str(found[name]) for name in ("trainer.save_folder", "data.remote") if found[name].status != "ok"] == []
    assert found["S3 credentials"].text == f"found by env, for {s3.url}"
    assert found["S3 clock"].status == "ok"
    assert s3.keys("runs") + s3.keys("shards") == before == ["shards/index.json"]

    assert "no index.json" in made("data.remote=s3://sit/nothing")["data.remote"].text
    missing = made("trainer.save_folder=s3://nowhere/runs")["trainer.save_folder"]
    assert missing.status == "failed"
    assert missing.text.startswith("list: s3://nowhere/runs")
    assert "nowhere" not in [bucket["Name"] for bucket in s3.client.list_buckets()["Buckets"]]

    with Unconditional(s3.url) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
        found = made()["trainer.save_folder"]
        assert found.status == "warning"
        assert "no conditional writes" in found.text
        proxy.fault("403", r"PUT .*object")
        refused = made()["trainer.save_folder"]
        assert refused.text.startswith("write: s3://sit/runs/")
        assert "s3:PutObject" in refused.advice
        proxy.heal()
        proxy.fault("403", r"DELETE .*object")
        kept = made()["trainer.save_folder"]
        assert kept.text.startswith("delete: s3://sit/runs/")
        assert "stays there" in kept.text
    assert s3.keys("runs") != []
    monkeypatch.setenv("S3_ENDPOINT_URL", s3.url)

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "notthesecret")
    wrong = made()
    assert wrong["S3 clock"].status == "ok"
    assert wrong["trainer.save_folder"].status == "failed"
    assert "SignatureDoesNotMatch" in wrong["trainer.save_folder"].text
    assert "notthesecret" not in "".join(map(str, wrong.values()))
