"""The keys of a run's YAML as text, for --help."""

import dataclasses
import typing
from collections.abc import Iterator

from sit_composer.config.schema import Config

WORDS = {"None": "null", "True": "true", "False": "false"}  # as a YAML writes them


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
