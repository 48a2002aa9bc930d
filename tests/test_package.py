"""The public names, in fresh processes: what they import, and what type checkers see."""

import ast
import subprocess
import sys

import pytest

import sit_composer
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
