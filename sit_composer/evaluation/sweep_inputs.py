"""A sweep's inputs: its cells, its networks and its reference, the same ones after an interruption."""

import hashlib
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from sit_composer.checkpoint.record import CONFIG, EXPORTED_FILE, Checkpoint, digest
from sit_composer.cli import is_remote
from sit_composer.data.spec import INDEX_NAME
from sit_composer.data.stream import read_text
from sit_composer.errors import UserError
from sit_composer.evaluation.sweep_table import values_of
from sit_composer.gallery import Networks, choose_labels, complete, guided, load_networks, my_rank


def load(args: Namespace, cell: Namespace, first: Networks | None = None) -> Networks:
    """The networks of a cell's weights; with the guide, which cells without guidance don't use.

    They come from the ``first`` ones' files: of newer checkpoints that training saves meanwhile none is taken, and
    none is downloaded again.
    """
    if first is None:
        return load_networks(Namespace(**{**vars(cell), "guide": args.guide}))
    guide = place_of(first.weaker) if first.weaker else None
    found = load_networks(Namespace(**{**vars(cell), "checkpoint": place_of(first.checkpoint), "guide": guide}))
    weaker = with_source(found.weaker, args.guide) if found.weaker else None
    return found._replace(checkpoint=with_source(found.checkpoint, args.checkpoint), weaker=weaker)


def with_source(checkpoint: Checkpoint, given: str) -> Checkpoint:
    """The checkpoint, whose file is a copy if the one that was ``given`` is remote."""
    return replace(checkpoint, source=given) if is_remote(given) else checkpoint


def distinct(args: Namespace, networks: Networks) -> list[Namespace]:
    """The cells, complete and without equal ones; raises UserError for one that the network can't generate."""
    record, found = networks.checkpoint.record, dict[tuple, Namespace]()
    for cell in args.cells:
        complete(cell, record)
        record.name_of(cell.weights, args.checkpoint)
        guided(cell, networks)
        if (count := len(choose_labels(cell, record.classes))) < (ranks := my_rank()[1]):
            option = "--num-images" if args.classes is None else "--classes"
            raise UserError(f"{option}: got {count} images, expected at least one for each of the {ranks} ranks")
        found.setdefault(tuple(values_of(cell).values()), cell)
    return list(found.values())


def identity_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What all weights of a checkpoint share; an exported folder has a file for each."""
    place = place_of(checkpoint)
    where = checkpoint.source if is_remote(checkpoint.source) else place
    return {"path": where, "step": checkpoint.step, "sha256": digest(place)}


def place_of(checkpoint: Checkpoint) -> str:
    """The file or folder that holds all its weights."""
    file = Path(checkpoint.path)
    exported = EXPORTED_FILE.fullmatch(file.name) and (file.parent / CONFIG).is_file()
    return str(file.parent if exported else file)


def check_same(settings: dict[str, Any], networks: Networks) -> None:
    """Raises UserError unless the networks are of the checkpoints that the settings name."""
    for name, checkpoint in (("checkpoint", networks.checkpoint), ("guide", networks.weaker)):
        if checkpoint and identity_of(checkpoint) != (began := settings[name]):
            what = f"got step {checkpoint.step}, but the sweep began with step {began['step']} of {began['path']}"
            raise UserError(f"{checkpoint.source}: {what}; give one checkpoint instead of the folder")


def identity_of_reference(path: str) -> dict[str, str]:
    """What tells one reference from another: a file's content, shards' index, or the names and sizes in a folder."""
    local = Path(path)
    if is_remote(path) or (local / INDEX_NAME).exists():
        text, _ = read_text(path.rstrip("/") if is_remote(path) else None, path, INDEX_NAME)
    elif local.is_file():
        return {"path": path, "sha256": digest(path)}
    else:
        files = (file for file in sorted(local.rglob("*")) if file.is_file())
        text = "".join(f"{file.relative_to(local)} {file.stat().st_size}\n" for file in files)
    return {"path": path, "sha256": hashlib.sha256(text.encode()).hexdigest()}
