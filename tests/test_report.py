"""The page about a run: what it holds, and how it looks in a real browser."""

import io
import json
import re
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from sit_composer import report
from sit_composer.page import GRID_BYTES, GRIDS, POINTS, report_page
from sit_composer.storage import LocalFolder, S3Folder
from tests.helpers.runs import REMOTE

SCRIPT = "</script><script>document.title = 'taken over'</script><b>"


def png(side: int, noisy: bool = False) -> bytes:
    levels = (
        np.random.default_rng(0).integers(256, size=(side, side, 3), dtype=np.uint8)
        if noisy
        else np.zeros((side, side), np.uint8)
    )
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    return buffer.getvalue()


def write_run(folder, name="first", length=3000, **config) -> LocalFolder:
    """A run's folder as training leaves it, resumed at 2000, with 40 grids."""
    (folder / "samples").mkdir(parents=True)
    about = {"network": f"a SiT {SCRIPT}", "data": "runs/digits", "length": f"{length}ba"}
    attempt = {"about": about, "host": "node-1", "ranks": 2, "commit": "0123abcd+", "versions": {"torch": "2.7.0"}}
    rows = [{"start": 0, "time": 1e9, **attempt, "peak": 1000.0}]
    for batch in range(1, length + 1):
        now, loss = 1e9 + batch / 10 + 800 * (batch > 2000), 1 + 1 / batch
        rows.append({"batch": batch, "batches": 1, "samples": 64 * batch, "epoch": 0, "time": now, "lr": 1e-4,
                     "loss/train/total": loss, "gradient/norm": 0.5, SCRIPT: 1.0,
                     "throughput/images_per_sec": 400.0})  # fmt: skip
        if batch == 2000:
            rows.append({"start": batch, "time": 1e9 + 1000, **attempt, "peak": 1000.0})
        if batch % 1000 == 0:
            rows.append({"batch": batch, "loss/time/0-0.5": 2.0, "loss/time/0.5-1": None})
            rows.append({"batch": batch, "nan/skipped": 3, "nan/rollbacks": 0})
            rows.append({"batch": batch, "metrics/eval/loss": 0.75, "metrics/frechet_distance": 5e4 / batch})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"batch": 30')
    for i in range(40):
        (folder / "samples" / f"ba{50 * (i + 1):07}.png").write_bytes(png(64))
    (folder / "samples" / "ba0002050.png").write_bytes(png(600, noisy=True))
    (folder / "samples" / "ba0002100.png").write_bytes(b"\x89PNG no image")
    (folder / "ep0-ba3000-rank0.pt").write_bytes(b"0" * 2_500_000)
    (folder / "config.yaml").write_text(yaml.safe_dump({"run_name": name, **config}))
    return LocalFolder(str(folder))


def data_of(page: bytes) -> dict:
    (found,) = re.findall(r'<script type="application/json" id="run-data">(.*)</script>\n', page.decode())
    return json.loads(found)


def test_a_page_has_all_of_a_run_and_is_bounded(tmp_path):
    page = report_page([write_run(tmp_path, name=SCRIPT)])
    (run,) = data_of(page)["runs"]
    assert run["name"] == SCRIPT
    assert page.count(b"</script>") == 2  # a name ends none
    assert not re.search(rb'(src|href)=["\']?(?!data:)\w|url\((?!#)|@import|https?://(?!www\.w3\.org/2000/svg)', page)
    assert [attempt["start"] for attempt in run["attempts"]] == [0, 2000]
    assert run["seconds"] == pytest.approx(300)  # without the 800 between the attempts
    loss = run["curves"]["loss/train/total"]
    assert (len(loss["x"]), loss["x"][0], loss["x"][-1]) == (POINTS, 1, 3000)
    assert loss["y"][-1] == 1 + 1 / 3000
    assert loss["smooth"][0] == loss["y"][0]
    assert run["curves"]["throughput/mfu"]["y"][0] == 0.4
    assert run["curves"]["loss/time/0-0.5"] == {"x": [1000, 2000, 3000], "y": [2.0] * 3}
    assert run["evaluations"][0] == {"batch": 1000, "metrics/eval/loss": 0.75, "metrics/frechet_distance": 50}
    assert run["checkpoints"] == [["ep0-ba3000-rank0.pt", 2_500_000]]
    batches = [grid["batch"] for grid in run["grids"]]
    assert (len(batches), batches[0], batches[-1]) == (GRIDS - 1, 50, 1950)  # without the one that is no image
    assert len(page) < 300_000


def test_a_large_image_is_made_smaller(tmp_path):
    folder = write_run(tmp_path)
    (tmp_path / "samples" / "ba0002100.png").write_bytes(png(1500, noisy=True))
    source = data_of(report_page([folder]))["runs"][0]["grids"][-1]["src"]
    assert source.startswith("data:image/webp;base64,")
    assert (tmp_path / "samples" / "ba0002100.png").stat().st_size > 10 * GRID_BYTES
    assert len(source) < 1_000_000  # noise; real images are far smaller


def test_no_secret_of_a_config_is_on_the_page(tmp_path):
    logger = {"wandb": {"api_key": "hunter2", "entity": "me"}, "mlflow": {"tracking_uri": "https://me:hunter2@host/x"}}
    trainer = {"list": [{"password": "hunter2"}], "load_path": "https://h/x?a=1&sig=hunter2&X-Amz-Signature=hunter2"}
    page = report_page([write_run(tmp_path, loggers=logger, trainer=trainer)])
    assert b"hunter2" not in page
    assert data_of(page)["runs"][0]["keys"]["loggers.mlflow.tracking_uri"] == "https://…@host/x"
    assert data_of(page)["runs"][0]["keys"]["trainer.load_path"] == "https://h/x?a=1&sig=…&X-Amz-Signature=…"


def test_an_earlier_versions_run_has_a_page_without_curves(tmp_path):
    (tmp_path / "config.yaml").write_text("run_name: old\ntrainer: {max_duration: 10ba}\n")
    (run,) = data_of(report_page([LocalFolder(str(tmp_path))]))["runs"]
    assert (run["name"], run["duration"], run["curves"], run["attempts"], run["last"]) == ("old", "10ba", {}, [], None)


def test_the_command_writes_its_page_and_refuses_what_it_can_not_do(tmp_path, capsys):
    write_run(tmp_path / "runs" / "checkpoints", length=10)
    out = tmp_path / "page.html"
    command = [str(tmp_path / "runs" / "checkpoints"), "--out", str(out)]
    for _ in range(2):  # its own page is replaced
        assert report.main(command) == 0
    assert capsys.readouterr().out.splitlines() == [str(out)] * 2
    assert report.main([str(tmp_path / "runs"), "--out", str(out)]) == 2
    hint = f"error: {tmp_path}/runs: no run, expected the folder that trainer.save_folder names; did you mean "
    assert capsys.readouterr().err.splitlines()[-1] == f"{hint}{tmp_path}/runs/checkpoints?"
    out.write_text("<p>mine</p>")
    assert report.main(command) == 2
    assert "exists, and this command didn't write it" in capsys.readouterr().err
    assert out.read_text() == "<p>mine</p>"
    assert report.main([str(tmp_path / "missing")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/missing: no such folder\n"
    assert report.main([str(out)]) == 2
    assert capsys.readouterr().err == f"error: {out}: a file, expected the folder of its run\n"


@pytest.mark.parametrize("config", ["trainer: text", "self: &s {x: *s}"])
def test_a_config_that_is_none_of_ours_has_a_page(tmp_path, config):
    (tmp_path / "config.yaml").write_text(config)
    assert report.main([str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0


def test_what_can_not_be_read_of_a_run_is_told(tmp_path, capsys):
    files = [tmp_path / "run" / name for name in ("config.yaml", "metrics.jsonl")]
    files[0].parent.mkdir()
    for file in files:
        file.write_text("x: [")
    assert report.main([str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert told == [f"warning: {file}: can't be read; the page is without it" for file in files]


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium here")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


# The least contrast of a text with what is behind it, by WCAG 2.2's formula; those of the curves' legends too.
CONTRAST = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const linear = c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const light = color => color.slice(0, 3).map(c => linear(c / 255))
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const color = rgb(getComputedStyle(e).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
  };
  let least = [99, ""];
  for (const e of document.querySelectorAll("main *:not(title)")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(e), front = rgb(e instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(front), light(behind(e))], ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < least[0]) least = [ratio, e.textContent];
  }
  return least;
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_in_a_browser(browser, tmp_path, scheme, width):
    write_run(tmp_path / "one", name=SCRIPT, frechet={"features": "inception"})
    second = "a-second-run-with-a-long-name" * 3
    write_run(tmp_path / "two", name=second, optimizer={"lr": 0.25})
    for name, runs in {"alone": ["one"], "both": ["one", "two"]}.items():
        assert report.main([*(str(tmp_path / run) for run in runs), "--out", str(tmp_path / f"{name}.html")]) == 0
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page, told = context.new_page(), []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on(
        "request", lambda request: told.append(request.url) if not request.url.startswith(("file:", "data:")) else None
    )
    for name in ("alone", "both"):
        page.goto(f"file://{tmp_path}/{name}.html")
        page.wait_for_selector("svg path")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ratio, text = page.evaluate(CONTRAST)
        assert ratio >= 4.5, text
        shown = page.inner_text("main")
        assert "null" not in shown  # which append() writes for what is absent
        assert SCRIPT in shown  # as text
        for text in (
            "3,000",
            "40 %",
            "0123abcd+",
            "node-1, 2 ranks",
            "best FID",
            "\nFID\n" if name == "alone" else "\nFID and Fréchet distance\n",
            "ep0-ba3000-rank0.pt",
            "2.5 MB",
            *("Gradient norm", "Learning rate", "Throughput, images per second", "Evaluation loss"),
            *("Loss by time, latest", "Loss by time, over training" if name == "alone" else "Loss by time: "),
            *("steps skipped as not finite", "0.75", "16.67"),  # of evaluations: the loss, and the distance
        ):
            assert text in shown, text
        assert "composer sit_composer/train.py" in shown
        assert f"python -m sit_composer.export {tmp_path}/one --out exported" in shown
        assert f"python -m sit_composer.sample {tmp_path}/one --out samples" in shown
        assert page.locator("svg .resume").count() >= 5
        assert page.title() == (SCRIPT if name == "alone" else f"{SCRIPT} and {second}")
        shot = tmp_path / f"{name}.png"
        page.screenshot(path=shot, full_page=True)
        with Image.open(shot) as image:
            assert image.width == width
            brightness = np.asarray(image.convert("L")).mean()
            assert brightness > 200 if scheme == "light" else brightness < 60
    assert "optimizer.lr" in shown
    page.goto(f"file://{tmp_path}/alone.html")
    first = page.get_attribute(".samples img", "alt")
    page.locator(".slider input").fill("0")
    assert (first, page.get_attribute(".samples img", "alt")) == (
        "images generated at batch 1950",
        "images generated at batch 50",
    )
    assert page.evaluate("document.querySelector('.samples img').naturalWidth") == 64
    before = page.get_attribute("svg path[stroke-width='2']", "d")
    page.get_by_label("logarithmic batches").check()
    assert page.get_attribute("svg path[stroke-width='2']", "d") != before
    page.hover("svg >> nth=0")
    assert "batch " in page.inner_text(".tip >> nth=0")
    assert told == []
    context.close()


@pytest.mark.slow
def test_a_run_writes_its_page_at_each_save_in_s3_too_and_its_config_resumes_it(run, s3, tmp_path, monkeypatch):
    grid = "sample_grid={interval: 2ba, labels: [3], per_class: 2, num_steps: 2}"
    assert run("trainer.max_duration=4ba", "report=true", grid, *REMOTE) == 0
    folder = S3Folder("s3://sit/runs/quickstart")
    (found,) = data_of(folder.read("report.html"))["runs"]
    assert [grid["batch"] for grid in found["grids"]] == [2, 4]
    assert [name for name, _ in found["checkpoints"]] == ["ep0-ba2-rank0.pt", "ep0-ba4-rank0.pt"]
    assert found["last"]["batch"] == 4
    assert report.main(["s3://sit/runs/quickstart", "--out", str(tmp_path / "page.html")]) == 0
    assert data_of((tmp_path / "page.html").read_bytes())["runs"] == [found]
    from sit_composer import train

    (tmp_path / "config.yaml").write_bytes(folder.read("config.yaml"))  # as the page's command does
    assert train.main([str(tmp_path / "config.yaml"), "trainer.max_duration=6ba"]) == 0
    assert data_of(folder.read("report.html"))["runs"][0]["last"]["batch"] == 6
