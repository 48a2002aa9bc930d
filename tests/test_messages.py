"""The form of every message for users: "where: what is wrong, expected what, what to do", in the field's words.

The literal text of each error is read from the sources; what is formatted into it is written {} here.
"""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.helpers.paths import ROOT

ERRORS = {"UserError", "ConfigError", "DataError", "StorageError", "CheckpointError", "InputError", "OutputError"}
SOURCES = sorted(path for folder in ("sit_composer", "convert") for path in (ROOT / folder).rglob("*.py"))

# A place ({}, --option, key or section.key), in which up to three more words may say where: "{} row {}: ".
WHERE = re.compile(r"(argument )?((\{\}|--[\w{}-]+|'?s3://)\S*( [\w{}'\"-]+){0,3}|[\w.]*\w(\{\})?(\.[\w{}]+)*): \S")
WORDS = {  # not this: but that
    r"takes?\b(?! over)": "expected",
    r"pictures?\b": "image",
    r"(goes|go|going|went) on\b": "resume, continue",
    r"goes (over|with)\b": "overrides, needs",
    r"(is|are) there, and\b": "two sentences",
    r"(says?|tells?|told)\b": "use --option, is",
    r"(draws?|drawn)\b": "generate",
    r"(rank|node|process|GPU|actor|step) a (second|rank|node|process|GPU)\b": "per",
    r"(lies?|lay)\b": "is",
    r"be had\b": "read",
    r"what (is|are|was)\b": "the noun",
    r"of (those|them) (that|which|who)\b": "the noun",
    r"(whoever|whatever)\b": "the noun",
    r"(none|nobody|nothing) is\b": "no ...",
    r"as (many|much|few|little) as\b": "the number",
    r"in place of\b": "instead of",
    r"wants?\b": "expected",
    r"(another|other|such) (one|a thing|thing)\b": "the noun",
}
BANNED = re.compile("|".join(rf"\b({phrase})" for phrase in WORDS), re.IGNORECASE)


def literal(node: ast.expr) -> list[str]:
    """The texts that an expression may give, {} for each value that is formatted in; one for each side of an if."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        parts = [literal(part) if isinstance(part, ast.Constant) else ["{}"] for part in node.values]
        return ["".join(text for part in parts for text in part)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [left + right for left in literal(node.left) for right in literal(node.right)]
    if isinstance(node, ast.IfExp):
        return literal(node.body) + literal(node.orelse)
    return ["{}"]


def messages(source: str) -> Iterator[tuple[int, str]]:
    """The line and text of each error that is made from a text, not from another error alone."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name in ERRORS or (name == "error" and getattr(getattr(node.func, "value", None), "id", "") == "parser"):
            yield from ((node.lineno, text) for text in literal(node.args[0]) if re.search(r"\w", text))


def faults(text: str) -> list[str]:
    found = [f"not {match.group()!r}" for match in BANNED.finditer(text)]
    if "\n" in text:
        found.append("several lines")
    if text.endswith("."):
        found.append("ends with a period")
    if not WHERE.match(text):
        found.append("no place and colon at its head")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_message_has_the_houses_form(path):
    told = [f"{path}:{line}: {text!r}: {', '.join(faults(text))}" for line, text in messages(path.read_text())]
    told = [line for line in told if not line.endswith(": ")]
    assert not told, "\n".join(["", *told])


def test_messages_are_found():
    found = sum(len(list(messages(path.read_text()))) for path in SOURCES)
    assert found > 200


@pytest.mark.parametrize(
    ("source", "text", "wrong"),
    [
        ('UserError(f"{key}.eps: got {eps}, expected {bounds}")', "{}.eps: got {}, expected {}", []),
        ('UserError("seed: got " "-1, " + f"expected {bounds}")', "seed: got -1, expected {}", []),
        ('parser.error("argument --labels: needs --num-images")', "argument --labels: needs --num-images", []),
        ('parser.error(f"argument --{name}: got {value}")', "argument --{}: got {}", []),
        ('InputError(f"{table} row {n}: no label")', "{} row {}: no label", []),
        ('InputError(f"cannot read {path}: gone")', "cannot read {}: gone", ["no place and colon at its head"]),
        ('DataError(f"{path}: empty.")', "{}: empty.", ["ends with a period"]),
        ('UserError(f"{path}: no picture\\n")', "{}: no picture\n", ["not 'picture'", "several lines"]),
        ('ConfigError("ema.decay: it takes a number")', "ema.decay: it takes a number", ["not 'takes'"]),
    ],
)
def test_what_is_read_and_what_is_wrong_with_it(source, text, wrong):
    assert [found for _, found in messages(source)] == [text]
    assert faults(text) == wrong
