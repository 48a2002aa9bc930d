"""Writes the page configuration.md from the schema:   python docs/configuration.py > docs/configuration.md"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


from sit_composer.config.schema import Config, keys  # noqa: E402

INTRO = """\
# Configuration

All keys of a run's YAML, by section. On the command line, a key of a section is written with a dot, such as
`model.depth=12`, and overrides the YAML's. A key whose default is `???` must be given. The same keys are printed by
`composer sit_composer/train.py --help`. This page is generated from `sit_composer/config/schema.py` by
`python docs/configuration.py`.
"""


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
