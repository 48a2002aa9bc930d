"""The keys of a run's YAML as text: for --help, and as Markdown for docs/configuration.md.

python -m sit_composer.config.documentation > docs/configuration.md
"""

import dataclasses
import typing
from collections.abc import Iterator

from sit_composer.config.schema import Config

WORDS = {"None": "null", "True": "true", "False": "false"}  # as a YAML writes them
INTRO = """\
# Configuration

All keys of a run's YAML, by section. On the command line, a key of a section is written with a dot, such as
`model.depth=12`, and overrides the YAML's. A key whose default is `???` must be given. The same keys are printed by
`composer sit_composer/train.py --help`. This page is generated from `sit_composer/config/schema.py` by
`python -m sit_composer.config.documentation`.
"""


def keys(cls: type) -> Iterator[tuple[type | None, str, str, str, str]]:
    """Of each key of a section: its own section's class, if any, its name, default, meaning and expected values."""
    for f in dataclasses.fields(cls):
        default, choices = f.default_factory(), f.metadata["choices"]  # type: ignore[operator]
        shown = "{…}" if dataclasses.is_dataclass(default) else WORDS.get(str(default), str(default))
        expected = ", ".join(WORDS.get(str(choice), str(choice)) for choice in choices or ())
        types = (f.type, *typing.get_args(f.type)) if f.name != "eval_data" else ()  # its keys are data's
        section = next((t for t in types if isinstance(t, type) and dataclasses.is_dataclass(t)), None)
        yield section, f.name, shown, f.metadata["doc"], expected or str(f.metadata["bounds"] or "")


def documentation(cls: type = Config, prefix: str = "") -> str:
    """A line for each key, the sections' keys included."""
    lines = []
    for section, name, default, doc, expected in keys(cls):
        if section is None or default == "null":
            lines.append(f"  {prefix + name:<28} {doc}{expected and f' ({expected})'} [{default}]")
        if section is not None:
            lines.append(documentation(section, f"{prefix}{name}."))
    return "\n".join(lines)


def markdown() -> str:
    """The page docs/configuration.md: one table per section."""
    pages = [INTRO, table("Top level", "", Config)]
    for section, name, _, doc, _ in keys(Config):
        if section is not None:
            pages.append(table(f"`{name}`", f"{doc[0].upper()}{doc[1:]}.", section))
    return "\n".join(pages)


def table(title: str, meaning: str, cls: type) -> str:
    """A section's heading and its table."""
    head = [f"## {title}", "", *([meaning, ""] if meaning else [])]
    lines = [*head, "| key | default | meaning | expected |", "| --- | --- | --- | --- |"]
    lines += [f"| `{name}` | `{default}` | {doc} | {expected} |" for _, name, default, doc, expected in keys(cls)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
