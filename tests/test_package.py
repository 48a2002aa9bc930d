"""The public names, in fresh processes: what they import, and what type checkers see."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest

import sit_composer
from convert import to_mds
from sit_composer.cli import EXTRAS, require
from sit_composer.config.checks import check
from sit_composer.config.composer_classes import PACKAGES, find_class
from sit_composer.config.load import load_config
from sit_composer.errors import UserError
from tests.helpers.paths import ROOT


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import sit_composer", {"torch", "numpy", "composer", "streaming"}),
        (
            "from sit_composer import SiT, Transport, Guidance, sample_ode, sample_sde, load_checkpoint",
            {"composer", "streaming"},
        ),
    ],
)
def test_public_names_import_nothing_heavy(statement, absent):
    code = f"import sys; {statement}; print(*{absent} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_type_checkers_know_the_public_names_from_their_modules():
    tree = ast.parse((ROOT / "sit_composer" / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "sit_composer." in node.module]
    known = {alias.asname: node.module.removeprefix("sit_composer.") for node in imports for alias in node.names}
    assert known == sit_composer.PUBLIC
    assert set(sit_composer.__all__) == set(known)


def test_an_unknown_name_is_refused():
    with pytest.raises(ImportError, match="nonsense"):
        from sit_composer import nonsense  # noqa: F401


# --- Optional packages ---


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_logger_without_its_package_names_the_command_that_installs_it(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    config = load_config(str(ROOT / "yamls" / "quickstart.yaml"), [f"loggers={{file: {{}}, {name}: {{}}}}"])
    check(config, ranks=1)  # for another machine
    with pytest.raises(UserError) as error:
        check(config)
    command = f"pip install -e '.[{name}]'"
    expected = f"the package {name} is not installed; run {command} in the repository's folder"
    assert str(error.value) == f"loggers.{name}: {expected}"


def test_a_folder_of_a_packages_name_is_not_the_package(monkeypatch, tmp_path):
    (tmp_path / "neptune").mkdir()  # as wandb writes one into the working folder
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"^here: the package neptune is not installed; run pip install neptune$"):
        require("here", "neptune")


def test_ray_is_asked_for_before_the_conversion_begins(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert to_mds.main(["digits", "--out", str(tmp_path / "out"), "--engine", "ray"]) == 2
    assert "--engine ray: the package ray is not installed; run pip install -e '.[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "out.partial").exists()


def test_every_page_and_message_names_extras_that_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    assert set(EXTRAS.values()) == extras - {"bench", "browser", "dev"}
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for command in re.findall(r"pip install[^`\n]*", page.read_text().replace('uv pip install -e ".[sit]"', "")):
            named = re.match(r"pip install (?:\.|-e '\.\[(\w+)\]'|torch==\S+ torchvision)(?= |$)", command)
            assert named, f"{page.name}: {command}"
            assert named[1] in {None, "EXTRA", *extras}


def test_the_loggers_that_need_packages_are_composers():
    names = [class_name.removesuffix("Logger") for class_name in PACKAGES]
    assert [find_class("loggers", name)[0] for name in names] == list(PACKAGES)
