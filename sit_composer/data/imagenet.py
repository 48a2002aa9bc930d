"""ImageNet's classes: their ids of WordNet, by which one class is known under several names."""

from functools import cache
from pathlib import Path

IMAGENET = Path(__file__).with_name("imagenet_classes.txt")  # lines `ID NAME`, by label


@cache
def _ids() -> dict[str, str]:
    """The id of each class, by the id itself and by the name."""
    lines = [line.split(" ", 1) for line in IMAGENET.read_text().splitlines()]
    return {name: id_ for id_, title in lines for name in (id_, title)}


def known_as(classes: list[str]) -> list[str]:
    """The classes by label, those of ImageNet by their ids.

    A name may have synonyms after a comma, as on the Hub. The labels of 1000 classes without names, as of the authors'
    released weights, are ImageNet's.
    """
    if classes == [str(label) for label in range(1000)]:
        return list(dict.fromkeys(_ids().values()))
    return [_ids().get(name) or _ids().get(name.partition(",")[0], name) for name in classes]
