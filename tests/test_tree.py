"""The tests' own layout: they mirror the tree, and share helpers, not each other's modules."""

import re

import pytest

from tests.helpers.paths import ROOT

MODULES = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))
TESTS = [path for path in MODULES if path.name.startswith("test_")]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_module_imports_a_test_module(path):
    """Not conftest.py, either. What is shared belongs in tests/helpers."""
    found = re.findall(
        r"^\s*(?:from|import)\s+tests\.(?:\w+\.)*(?:test_\w+|conftest)\b.*", (ROOT / path).read_text(), re.M
    )
    assert found == []


def test_every_folder_of_tests_is_one_of_the_sources():
    for path in TESTS:
        folder = path.parent.relative_to("tests")
        places = [ROOT / "sit_composer" / folder, ROOT / folder]
        assert any(place.is_dir() for place in places), path
