"""The layout's rules that a linter doesn't know: sizes, imports inside functions, and what tests may import."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.paths import ROOT

PRODUCT = [path for room in ("sit_composer", "convert") for path in sorted((ROOT / room).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef))


def place(path: Path, node: ast.stmt) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def test_no_file_is_over_300_lines_and_no_function_over_80():
    files = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in PRODUCT}
    assert {path: lines for path, lines in files.items() if lines > 300} == {}
    sizes = {place(path, f): f.end_lineno - f.lineno + 1 for path in PRODUCT for f in functions(path)}
    assert {where: lines for where, lines in sizes.items() if lines > 80} == {}
    assert sum(lines > 40 for lines in sizes.values()) <= 20
    # 12,470 before what made it fast, 13,506 before newer recipes, 15,837 before issue 14
    assert sum(files.values()) <= 19_400


def test_imports_inside_functions_are_few_and_say_why():
    nested = {
        place(path, node): path.read_text().splitlines()[node.lineno - 1]
        for path in PRODUCT
        for function in functions(path)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert len(nested) <= 40
    assert [where for where, line in nested.items() if "#" not in line] == []


def test_tests_import_helpers_and_no_other_tests():
    imports = {
        place(path, node): node.module
        for path in TESTS
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom) and node.module
    }
    assert {where: name for where, name in imports.items() if re.search(r"^tests\.(.*\.)?(test_|conftest)", name)} == {}
