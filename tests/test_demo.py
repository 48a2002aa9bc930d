"""The demo: how images form, and its page in a real browser."""

import base64
import io
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sit_composer import demo, sample
from sit_composer.autoencoder import AutoencoderSpec, PixelAutoencoder, to_uint8
from sit_composer.checkpoint.record import Record
from sit_composer.choices import ODE_METHODS, Sampling
from sit_composer.errors import INTERRUPTED, UserError
from sit_composer.film import TIMES, film
from sit_composer.generate import generate
from sit_composer.guidance import Guidance
from sit_composer.transport import Transport
from tests.helpers.networks import small_network
from tests.helpers.paths import REFERENCE, ROOT

RUN = REFERENCE / "earlier" / "run"
CHECKPOINTS = [str(RUN / "ep0-ba4-rank0.pt"), str(RUN / "ep1-ba8-rank0.pt")]
SHOTS = os.environ.get("DEMO_SCREENSHOTS")  # a folder, to look at the pages that the test saw


@pytest.mark.parametrize("solver", [*(("ODE", name) for name in ODE_METHODS), ("SDE", "Euler"), ("SDE", "Heun")])
def test_watching_changes_no_bit_and_sees_every_evaluation(solver):
    guidance, sampling = Guidance(small_network().eval(), 1.5), Sampling(*solver, num_steps=5, cfg_scale=1.5)
    seen = []
    alone, cost = generate(guidance, Transport(), [1, 2], [0, 1], sampling)
    watched, _ = generate(guidance, Transport(), [1, 2], [0, 1], sampling, lambda *args: seen.append(args))
    assert torch.equal(alone, watched)
    assert len(seen) == cost["evaluations"]
    if solver != ("SDE", "Heun"):  # which adds noise before it evaluates
        noise = [np.random.default_rng((0, i)).standard_normal((4, 8, 8), dtype=np.float32) for i in (0, 1)]
        assert np.array_equal(seen[0][0].numpy(), np.stack(noise))
    x, t, prediction = seen[len(seen) // 2]
    with torch.no_grad():
        assert torch.equal(guidance(x, t, torch.tensor([1, 2])), prediction)


def shoot(sampling: Sampling, tell=lambda t: None):
    network = small_network(in_channels=1, learn_sigma=False).eval()
    sizes = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 10, "in_channels": 1}
    record = Record(sizes, {}, AutoencoderSpec(None, 1), [str(i) for i in range(10)])
    return network, film(record, network, PixelAutoencoder(1), sampling, [3, 7], tell)


def levels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_a_film_shows_noise_states_what_is_expected_of_them_and_the_images():
    sampling, times = Sampling("ODE", "euler", 11), []
    network, (images, frames) = shoot(sampling, times.append)
    x, _ = generate(guidance := Guidance(network, 1.0), Transport(), [3, 7], [0, 1], sampling)
    assert np.array_equal(levels(images), to_uint8(x)[:, 0])
    assert times == pytest.approx([i / 10 for i in range(10)])
    assert len(frames) == len(TIMES)
    noise = [np.random.default_rng((0, i)).standard_normal((1, 8, 8), dtype=np.float32) for i in (0, 1)]
    x, y = torch.from_numpy(np.stack(noise)), torch.tensor([3, 7])
    for i in range(10):
        t = torch.full((2,), i / 10)
        with torch.no_grad():
            velocity = guidance(x, t, y)
        if i % 2 == 0:  # at TIMES; the straight line from here ends at x + (1 - t) v
            states, expected = frames[i // 2]
            assert np.abs(levels(states).astype(int) - to_uint8(x)[:, 0].numpy()).max() <= 1
            ends = to_uint8(x + (1 - i / 10) * velocity)[:, 0].numpy()
            assert np.abs(levels(expected).astype(int) - ends).max() <= 1
        x = x + 0.1 * velocity


def test_few_evaluations_fill_a_film_and_one_can_be_stopped():
    assert len(shoot(Sampling("ODE", "euler", 2))[1][1]) == len(TIMES)

    def stop(t: float) -> None:
        if t > 0.3:
            raise UserError("stopped")

    with pytest.raises(UserError, match="stopped"):
        shoot(Sampling("ODE", "heun", 11), stop)


def test_what_is_wrong_with_the_command_is_told_before_anything_is_loaded(capsys, monkeypatch):
    assert demo.main([CHECKPOINTS[0], "nothing.pt"]) == 2
    assert demo.main([CHECKPOINTS[0]] * 2) == 2
    with monkeypatch.context() as ranks:
        ranks.setenv("WORLD_SIZE", "2")
        assert demo.main(CHECKPOINTS) == 2
    assert demo.main([CHECKPOINTS[0], "--host", "192.0.2.1"]) == 2
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert demo.main([CHECKPOINTS[0], "--port", str(port)]) == 2
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert demo.main([CHECKPOINTS[0]]) == 2
    install = "run pip install -e '.[demo]' in the repository's folder"
    assert capsys.readouterr().err.splitlines() == [
        "error: nothing.pt: no checkpoint here",
        f"error: CHECKPOINT: {CHECKPOINTS[0]} is given twice",
        "error: WORLD_SIZE: got 2, expected one process; run python -m sit_composer.demo",
        "error: --host: got '192.0.2.1', expected an address of this machine (Cannot assign requested address)",
        f"error: --port: {port} can't be used (Address already in use); choose another",
        f"error: sit_composer.demo: the package gradio is not installed; {install}",
    ]


# --- In a browser ---


@pytest.fixture(scope="module")
def outside():
    """A proxy to all other hosts that only counts who asks for it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield server


@pytest.fixture(scope="module")
def address(outside, tmp_path_factory):
    """Where the demo of two checkpoints is served. In the end Ctrl-C ends it cleanly."""
    proxy = f"http://127.0.0.1:{outside.getsockname()[1]}"
    environment = os.environ | {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "GRADIO_ANALYTICS_ENABLED": "True"}
    command = [sys.executable, "-m", "sit_composer.demo", *CHECKPOINTS]
    log = tmp_path_factory.mktemp("demo") / "errors"
    with open(log, "w") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            line = process.stdout.readline()
            match = re.match(r"http://127\.0\.0\.1:\d+/", line)
            assert match, (line, log.read_text())
            yield match[0]
        finally:
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=60)
    assert (process.returncode, rest) == (INTERRUPTED, "")
    assert log.read_text().splitlines() == ["loading gradio …", "loading torch …", "", "stopped"]
    with pytest.raises(BlockingIOError):
        outside.accept()


class Page:
    """The demo's page in a browser, as a user handles it."""

    def __init__(self, browser, address: str, width: int, height: int, scheme: str):
        self.page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.faults: list[str] = []
        self.page.on("console", lambda said: self.faults.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self.check(request.url, address))
        self.page.goto(address)

    def check(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.faults.append(url)

    def choose(self, label: str, option: str) -> None:
        self.page.get_by_label(label, exact=True).click()
        self.page.get_by_role("option", name=option, exact=True).click()

    def fill(self, label: str, value: str) -> None:
        self.page.get_by_label(label).first.fill(value)
        self.page.keyboard.press("Tab")

    def press(self, button: str) -> None:
        self.page.get_by_role("button", name=button).click()

    def images(self, count: int) -> list[np.ndarray]:
        """The images that are shown, once there are so many."""
        self.page.wait_for_function(f"document.querySelectorAll('.view img').length == {count}")
        sources = [image.get_attribute("src") for image in self.page.locator(".view img").all()]
        files = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
        return [np.asarray(Image.open(io.BytesIO(file))) for file in files]

    def alert(self) -> str:
        return self.page.get_by_role("alert").inner_text()

    def shoot(self, name: str) -> None:
        if SHOTS:
            self.page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium here, which apt-get install chromium installs")
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def drawn(command: str, folder: Path) -> list[np.ndarray]:
    """The images of the command that the page shows."""
    words = shlex.split(command.replace("DIR", str(folder)))
    assert words[:3] == ["python", "-m", "sit_composer.sample"]
    assert sample.main(words[3:]) == 0
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]


@pytest.mark.slow
def test_the_page_generates_compares_refuses_and_stops(browser, address, tmp_path):
    page = Page(browser, address, 1280, 900, "light")
    page.choose("class", "7")
    page.choose("solver", "SDE Euler")
    page.fill("time points", "20")
    page.fill("seed", "5")
    page.press("Generate")
    images = page.images(8)  # four of each checkpoint
    page.shoot("desktop")
    commands = page.page.locator(".films code").all_inner_texts()
    expected = [image for i, command in enumerate(commands) for image in drawn(command, tmp_path / str(i))]
    assert all(np.array_equal(a, b) for a, b in zip(images, expected, strict=True))
    assert [CHECKPOINTS[i] in commands[i] for i in (0, 1)] == [True, True]
    assert all("--classes=7" in command and "--seed=5" in command for command in commands)

    page.page.get_by_label("time", exact=True).fill("2")  # the slider, on which images change to earlier states
    assert page.page.locator(".view img").first.evaluate("image => getComputedStyle(image).opacity") == "0"
    page.shoot("states")

    page.page.get_by_label(CHECKPOINTS[1]).uncheck()
    page.choose("solver", "ODE dopri5")
    page.page.get_by_label("time points").wait_for(state="hidden")  # it chooses its own
    page.press("Generate")
    page.images(4)
    assert page.page.locator(".films code").count() == 1

    page.choose("solver", "ODE heun")
    page.fill("time points", "1")
    page.press("Generate")
    page.page.get_by_role("alert").wait_for()
    assert page.alert() == "--num-steps: got '1', expected a whole number of at least 2"
    page.shoot("refused")

    page.fill("time points", "100000")
    page.press("Generate")
    page.page.get_by_text("generating").first.wait_for()
    page.shoot("progress")
    waiting = Page(browser, address, 1280, 900, "light")  # of another user, whose work waits for the first one's
    waiting.press("Generate")
    waiting.page.get_by_text("queue").first.wait_for()
    waiting.press("Stop")
    page.press("Stop")
    page.page.get_by_text("stopped").wait_for()
    waiting.page.get_by_text("stopped").wait_for()
    waiting.press("Generate")
    waiting.images(8)
    assert waiting.faults == []

    page.fill("time points", "5")
    page.fill("guidance scale", "2")
    page.fill("guide until", "0.6")
    page.choose("weights", "training")
    page.press("Generate")
    page.page.get_by_text("--cfg-interval").wait_for()
    command = page.page.locator(".films code").inner_text()
    assert "--weights=training --cfg-scale=2 --cfg-interval 0 0.6" in command.replace("2.0", "2")
    images = zip(page.images(4), drawn(command, tmp_path / "guided"), strict=True)
    assert all(np.array_equal(shown, expected) for shown, expected in images)
    assert page.faults == []


@pytest.mark.slow
def test_the_command_of_a_remote_run_names_the_checkpoint_that_is_shown():
    from sit_composer.demo_page import lasting  # loads Gradio

    run, copy = "s3://bucket/run/checkpoints", "/tmp/copy/ep1-ba8-rank0.pt"
    assert lasting(run, copy) == lasting(f"{run}/", copy) == f"{run}/ep1-ba8-rank0.pt"
    assert lasting(f"{run}/ep1-ba8-rank0.pt", copy) == f"{run}/ep1-ba8-rank0.pt"
    assert lasting("hf://owner/name", "/tmp/copy/5f0a") == "hf://owner/name"
    newest = "runs/first/ep1-ba8-rank0.pt"
    assert lasting("runs/first", newest) == lasting("runs/first/latest-rank0.pt", newest) == newest


@pytest.mark.slow
def test_the_page_fits_a_phone(browser, address):
    page = Page(browser, address, 390, 844, "dark")
    page.press("Generate")
    page.images(8)
    page.shoot("phone")
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.faults == []
