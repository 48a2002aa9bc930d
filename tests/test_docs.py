"""README and docs: their commands run in a reader's order; what can't run here has options, keys and files that exist.

Blocks marked ``bash`` and ``python`` run, page by page, in one folder. Blocks marked ``shell`` (a GPU, a bucket, a
cluster or hours are needed) are parsed by the commands' own parsers, and ``yaml`` by the config's.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import pytest
from omegaconf import OmegaConf

from sit_composer.config.checks import check
from sit_composer.config.load import load_config
from sit_composer.config.schema import Config
from sit_composer.launch import free_port
from tests.helpers.paths import ROOT

ORDER = ("data", "training", "resuming", "clusters", "sampling", "evaluation", "weights", "python")  # others follow
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ORDER),
    *sorted(path for path in (ROOT / "docs").glob("*.md") if path.stem not in ORDER),
]
MODULES = (
    *("sit_composer.sample", "sit_composer.evaluate", "sit_composer.bits_per_dim", "sit_composer.export"),
    *("sit_composer.features", "sit_composer.memory", "sit_composer.tiny_autoencoder", "tests.helpers.torture"),
    *("sit_composer.posthoc_ema", "sit_composer.demo", "sit_composer.doctor", "sit_composer.sweep"),
    "sit_composer.report",
)
SCRIPTS = (
    *("convert/to_mds.py", "convert/verify_mds.py", "sit_composer/train.py"),
    *(f"tests/benchmarks/{path.name}" for path in sorted((ROOT / "tests/benchmarks").glob("[!_]*.py"))),
)
COMMANDS = {f"python -m {module}": module for module in MODULES} | {  # how a command begins: its module
    f"python {path}": path.removesuffix(".py").replace("/", ".") for path in SCRIPTS
}
OTHERS = (
    "docker",
    "make",
    "pip",
    "huggingface-cli",
    "python -m pytest",
    "sbatch",
    "srun",
)  # whose arguments are not checked
SECTIONS = {f.name for f in dataclasses.fields(Config)}
NAMES = re.compile(r"(?:sit_composer|convert|yamls|tests|docs)/[\w/]+(?:\.\w+)?")  # of our files
IN_TEXT = re.compile(r"`([^`\n]+)`")
FILES = (".html", ".json", ".md", ".npz", ".pt", ".py", ".safetensors", ".yaml")
FOREIGN = {"--ckpt", "--nodes"}  # options of other programs
THEIRS = ("coming_from_sit", "coming_from_lmms_engine")  # whose first columns are of other programs


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """The page's fenced blocks in those languages, as (language, content)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [(language, content) for language, content in found if language in languages]


def lines(block: str) -> list[str]:
    """The commands of a block, each on one line."""
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def text_of(page: Path) -> str:
    """The page without its fenced blocks, and of tables that compare with another program, without its column."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^\|[^|\n]*\|", "|", text, flags=re.MULTILINE) if page.stem in THEIRS else text


# --- Commands that run ---


def make_sources(folder: Path) -> None:
    """What a reader has: a folder of images by class, and a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = []
    for i in range(100):
        buffer = io.BytesIO()
        Image.fromarray((digits.images[i] * 15).astype("uint8")).save(buffer, "PNG")
        rows.append({"image": buffer.getvalue(), "label": int(digits.target[i])})
        path = folder / "images" / f"class{digits.target[i]}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Iterator[Path]:
    """The folder in which all pages are followed, and in which this process is meanwhile."""
    folder = tmp_path_factory.mktemp("reader")
    make_sources(folder)
    for name in ("sit_composer", "convert", "yamls", "tests"):
        (folder / name).symlink_to(ROOT / name)
    with contextlib.chdir(folder):
        yield folder


def run(command: str, folder: Path) -> None:
    """Runs a command: training in processes of its own; the others in this one, which has imported all they need."""
    name = next((name for name in COMMANDS if f"{command} ".startswith(f"{name} ")), None)
    if name is None or name.endswith("train.py"):
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PET_MASTER_PORT": str(free_port()),  # torchrun's, which another test may have taken
        }
        done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    else:
        arguments = shlex.split(command.removeprefix(name), comments=True)
        assert start(COMMANDS[name], arguments) == 0, command


@pytest.fixture(scope="module")
def names() -> dict:
    """What the pages' Python code has defined so far."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash", "python")], ids=lambda page: page.stem)
def test_a_pages_commands_run(page, reader, names):
    for language, content in blocks(page, "bash", "python"):
        if language == "bash":
            for command in lines(content):
                run(command, reader)
        elif "torch.jit.script" in content:  # which reads its source from a file
            (reader / "block.py").write_text(content)
            runpy.run_path("block.py", run_name="block")
        else:
            exec(content, names)
    if page.stem == "sampling":
        assert (reader / "runs/first/ode/grid.png").exists()
        assert (reader / "runs/first/sde.npz").exists()
    if page.stem == "python":
        assert names["x"].shape == (4, 1, 8, 8)
        assert names["x"].isfinite().all()
        assert names["nats"].isfinite().all()


# --- Commands that are checked ---


class Parsed(BaseException):
    """Ends a command once its arguments are parsed."""


def parse(module: str, arguments: list[str]) -> argparse.Namespace:
    """What a command's own parser makes of the arguments."""

    def stop_after(method):
        def parse_and_stop(self, *args, **kwargs):
            raise Parsed(method(self, *args, **kwargs))

        return parse_and_stop

    with contextlib.ExitStack() as stack:
        for name in ("parse_args", "parse_intermixed_args"):
            method = getattr(argparse.ArgumentParser, name)
            stack.enter_context(patch.object(argparse.ArgumentParser, name, stop_after(method)))
        with pytest.raises(Parsed) as parsed:
            start(module, arguments)
    return parsed.value.args[0]


def start(module: str, arguments: list[str]) -> int:
    """Runs a command in this process; returns its exit code."""
    with patch.object(sys, "argv", [module, *arguments]):
        main = getattr(import_module(module), "main", None)
        return main() if main is not None else runpy.run_module(module, run_name="__main__")


def check_command(line: str) -> None:
    """Fails unless the line is of a command that exists, with arguments that it takes."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if words[:1] == ["composer"]:  # composer -n N [-m MODULE | FILE] …
        words = words[3:] if words[1] == "-n" else words[1:]
        words = ["python", *words]
    if words[:2] == ["bash", "yamls/clusters/run.sh"]:
        words = ["python", "sit_composer/train.py", *words[2:]]
    command = " ".join(words)
    name = next((name for name in COMMANDS if f"{command} ".startswith(f"{name} ")), None)
    if name is None:
        assert command.startswith(OTHERS), f"{line}: no such command"
        return
    arguments = parse(COMMANDS[name], words[len(name.split()) :])
    if name.endswith("train.py"):
        check(load_config(arguments.yaml, arguments.overrides), ranks=1)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "shell")], ids=lambda page: page.stem)
def test_commands_that_cannot_run_here_have_options_and_keys_that_exist(page, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    for _, content in blocks(page, "shell"):
        for line in lines(content):
            check_command(line)


def test_yaml_blocks_are_parts_of_a_config():
    for page in PAGES:
        for _, content in blocks(page, "yaml"):
            config = OmegaConf.merge(OmegaConf.load(ROOT / "yamls" / "sit_xl_2.yaml"), OmegaConf.create(content))
            config.pop("frechet", None)  # its files are not here
            overrides = OmegaConf.create({"data": {"remote": None, "local": "-"}, "trainer": {"save_folder": "-"}})
            path = io.StringIO(OmegaConf.to_yaml(OmegaConf.merge(config, overrides)))
            config = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
            config.scheduler = OmegaConf.create(content).get("scheduler", {})
            check(OmegaConf.to_object(config), ranks=1)


def test_every_make_target_that_is_named_exists():
    targets = {
        target
        for page in PAGES
        for target in re.findall(r"make ((?:test|quick|lint|bench|install)[a-z-]*)", page.read_text())
    }
    makefile = (ROOT / "Makefile").read_text()
    assert {"quickstart", "test", "test-slow", "lint"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


# --- What the text names ---


@cache
def help_of(module: str) -> str:
    """What a command prints for --help."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        start(module, ["--help"])
    return text.getvalue()


def is_key(name: str) -> bool:
    """Whether a name with a dot is a key of a run's config; those of Composer's own sections count as such."""
    if name.startswith(("trainer.", "algorithms.", "callbacks.", "loggers.", "scheduler.")):
        return True
    keys = re.findall(r"^  ([a-z_.]+) ", help_of("sit_composer.train"), re.MULTILINE)
    return re.sub("^eval_data", "data", name) in keys


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # a module without `main` runs again as a script
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_keys_options_and_files_in_the_text_exist(page):
    codes = IN_TEXT.findall(text_of(page))
    names = {name for code in codes for name in re.findall(r"(?<![\w./-])[a-z_]+\.[a-z_]+(?![\w./(-])", code)}
    keys = {name for name in names if name.partition(".")[0] in SECTIONS and not name.endswith(FILES)}
    assert [key for key in keys if not is_key(key)] == []
    named = {option for code in codes for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", code)}
    known = {option for module in COMMANDS.values() for option in re.findall(r"--[a-z][a-z-]*", help_of(module))}
    assert named - known - FOREIGN == set()
    files = {name for code in codes for name in NAMES.findall(code)}
    assert [name for name in files if not (ROOT / name).exists()] == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_lead_somewhere(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


# --- What the pages promise ---


def test_the_readme_is_short_and_leads_to_every_page():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 200
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme] == []


def test_images_are_small():
    images = list((ROOT / "docs" / "images").iterdir())
    assert {"digits.png", "fashion_mnist.png"} <= {image.name for image in images}
    assert [image.name for image in images if not 1000 < image.stat().st_size < 150_000] == []


def test_the_tree_is_complete():
    content = blocks(ROOT / "docs" / "development.md", "tree")[0][1]
    folders, named = [], set()
    for line in content.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [name]
        named.add("".join(folders))
    there = {
        f"{path.relative_to(ROOT)}{'/' if path.is_dir() else ''}"
        for path in ROOT.rglob("*")
        if path.name != "__pycache__"
    }
    assert named - there == set()
    modules = {
        str(path.relative_to(ROOT)) for room in ("sit_composer", "convert") for path in (ROOT / room).rglob("*.py")
    }
    assert {name for name in modules if not name.endswith("__init__.py")} - named == set()


def test_the_help_of_training_lists_every_key(capsys):
    with pytest.raises(SystemExit):
        import_module("sit_composer.train").main(["--help"])
    text = capsys.readouterr().out
    assert all(key in text for key in ("model.hidden_size", "transport.sample_eps", "eval_data", "trainer"))
