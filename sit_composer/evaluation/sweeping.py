"""Measures the cells of a grid, one after the other: see `sit_composer.sweep`."""

import hashlib
import json
import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from sit_composer import gallery
from sit_composer.bars import progress
from sit_composer.checkpoint.record import CONFIG, EXPORTED_FILE, Checkpoint, digest
from sit_composer.choices import ADAPTIVE_METHODS
from sit_composer.cli import is_remote
from sit_composer.data.spec import INDEX_NAME
from sit_composer.data.stream import read_text
from sit_composer.errors import UserError
from sit_composer.evaluation.features import Extractor, load_extractor
from sit_composer.evaluation.judge import Choice, Collected, Comparison, cache_folder
from sit_composer.evaluation.picture_sets import PictureSet, open_set
from sit_composer.evaluation.results import print_notes
from sit_composer.evaluation.sweep_table import draw_plot, make_table, name_of, values_of
from sit_composer.generate import mean_work
from sit_composer.outputs import write_bytes, write_json

RESULTS, TABLE, PLOT, IMAGES = "sweep.json", "sweep.md", "sweep.png", "images"
# Options that each cell's result has, or that have no influence on it.
APART = {"cells", "checkpoint", "out", "features", "by_name", "batch_size", "decode_batch_size", "cache", "keep_images"}
PATIENCE = timedelta(days=7)  # of other ranks, while the first one reads the reference or computes metrics
BAR = "{desc} |{bar:20}| {percentage:3.0f}% [{elapsed}<{remaining}]"


def run(args: Namespace) -> None:
    """Measures the cells that are missing, each rank of a launcher its share of the images, and prints the table."""
    rank, ranks = gallery.my_rank()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # for the extractor, too
    networks = first = load(args, args.cells[0])
    weights = args.cells[0].weights
    cells = distinct(args, networks)
    if rank == 0:
        if args.num_steps and all(cell.sampling_method in ADAPTIVE_METHODS for cell in cells):
            print("note: an adaptive solver chooses its own steps; --num-steps has no effect", file=sys.stderr)
        for cell in {cell.weights: cell for cell in cells if cell.weights != weights}.values():
            load(args, cell, first)  # a mistake in them shows now, not after the first ones' cells
    sweep = Sweep(args, networks, cells) if rank == 0 else None
    if ranks > 1:  # from here on, as streaming would give each rank of a group a share of the reference
        dist.init_process_group("gloo", timeout=PATIENCE)
    plan = [(sweep.missing, sweep.comparison.chosen, sweep.settings) if sweep else None]
    if ranks > 1:
        dist.broadcast_object_list(plan)
    missing, chosen, settings = plan[0]
    if not sweep:
        check_same(settings, networks)
    extractor = sweep.comparison.extractor if sweep else load_extractor(args.features)
    with progress(sum(map(cost, missing)), rank == 0, bar_format=BAR) as bar:
        for number, cell in enumerate(missing, 1):
            bar.set_description_str(f"{number} of {len(missing)}: {name_of(values_of(cell))}")
            if cell.weights != weights:
                networks, weights = load(args, cell, first), cell.weights
                check_same(settings, networks)
            samples, fake = measure(cell, networks, extractor, chosen, bar)
            if sweep:
                tqdm.write(f"{number} of {len(missing)}: {sweep.add(cell, samples, fake)}", file=sys.stderr)
    if sweep:
        if not missing:
            print("all cells were measured before", file=sys.stderr)
            sweep.write()  # after a stop between the results and what is made of them
        print_notes(sweep.results, "each cell")
        print(make_table(sweep.results))
        print(sweep.out / PLOT)


def load(args: Namespace, cell: Namespace, first: gallery.Networks | None = None) -> gallery.Networks:
    """The networks of a cell's weights; with the guide, which cells without guidance don't use.

    They come from the ``first`` ones' files: of newer checkpoints that training saves meanwhile none is taken, and
    none is downloaded again.
    """
    if first is None:
        return gallery.load_networks(Namespace(**{**vars(cell), "guide": args.guide}))
    guide = place_of(first.weaker) if first.weaker else None
    found = gallery.load_networks(Namespace(**{**vars(cell), "checkpoint": place_of(first.checkpoint), "guide": guide}))
    weaker = with_source(found.weaker, args.guide) if found.weaker else None
    return found._replace(checkpoint=with_source(found.checkpoint, args.checkpoint), weaker=weaker)


def with_source(checkpoint: Checkpoint, given: str) -> Checkpoint:
    """The checkpoint, whose file is a copy if the one that was ``given`` is remote."""
    return replace(checkpoint, source=given) if is_remote(given) else checkpoint


def distinct(args: Namespace, networks: gallery.Networks) -> list[Namespace]:
    """The cells, complete and without equal ones; raises UserError for one that the network can't generate."""
    record, found = networks.checkpoint.record, dict[tuple, Namespace]()
    for cell in args.cells:
        gallery.complete(cell, record)
        record.name_of(cell.weights, args.checkpoint)
        gallery.guided(cell, networks)
        if (count := len(gallery.choose_labels(cell, record.classes))) < (ranks := gallery.my_rank()[1]):
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
    return str(file.parent if EXPORTED_FILE.fullmatch(file.name) and (file.parent / CONFIG).is_file() else file)


def check_same(settings: dict[str, Any], networks: gallery.Networks) -> None:
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


def cost(cell: Namespace) -> int:
    """The work of a cell, for the bar: the network's passes, up to a factor that its cells are likely to share."""
    return cell.num_steps * (1 if cell.sampling.cfg_scale == 1 else 2)


class Sweep:
    """The folder of results, and what its cells are compared with; for the first rank."""

    def __init__(self, args: Namespace, networks: gallery.Networks, cells: list[Namespace]) -> None:
        self.out, checkpoint = Path(args.out), networks.checkpoint
        side, count = checkpoint.record.image_size, len(gallery.choose_labels(cells[0], checkpoint.record.classes))
        images = PictureSet("each cell", count, lambda batch_size: iter(()))
        with cache_folder(args.cache) as cache, alone():
            self.comparison = Comparison(args, images, open_set(args.reference, args.image_size, cache))
            options = {name: value for name, value in vars(args).items() if name not in {*APART, *values_of(cells[0])}}
            extractor, guide = self.comparison.extractor, networks.weaker
            options |= {"guide": guide and identity_of(guide), "reference": identity_of_reference(args.reference)}
            second = extractor.second and extractor.second.identity
            options |= {"features": extractor.identity, "second extractor": second}
            self.settings = {"checkpoint": identity_of(checkpoint), **options}
            self.results = claim(self.out, self.settings)
            self.missing = [cell for cell in cells if all(values_of(cell) != one["cell"] for one in self.results)]
            if self.missing:
                probe = Collected("a blank image", extractor, self.comparison.chosen)
                probe.add(torch.zeros(2, 3, side, side, dtype=torch.uint8))  # fails now, not after a cell
                self.comparison.check_fit(probe.arrays())
                self.comparison.read_reference()
                self.comparison.check_fit(probe.arrays())  # now with the reference's images

    def add(self, cell: Namespace, samples: PictureSet, fake: dict[str, np.ndarray]) -> str:
        """Computes a cell's metrics, and writes the results; returns the cell in a line."""
        result = self.comparison.result(samples, fake)
        self.results.append({"cell": values_of(cell), **result})
        self.write()
        values = ", ".join(f"{name} {value:.5g}" for name, value in result["metrics"].items())
        return f"{name_of(values_of(cell))}: {values}"

    def write(self) -> None:
        there = claim(self.out, self.settings)  # to which another sweep with these settings may have added cells
        self.results += [one for one in there if all(one["cell"] != mine["cell"] for mine in self.results)]
        write_json({"settings": self.settings, "cells": self.results}, self.out / RESULTS)
        if self.results:
            write_bytes(f"{make_table(self.results)}\n".encode(), self.out / TABLE)
            write_bytes(draw_plot(self.results), self.out / PLOT)


def claim(out: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The results that the folder holds already; raises UserError if they are of others, or aren't a sweep's."""
    file = out / RESULTS
    if not file.exists():
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"--out: {out} holds files that are not a sweep's; choose another folder")
        write_json({"settings": settings, "cells": []}, file)
        return []
    try:
        content = json.loads(file.read_text())
        before, results = dict(content["settings"]), [{**r, "cell": dict(r["cell"])} for r in content["cells"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--out: {file} can't be read ({error!r}); delete it or choose another folder") from None
    for name, value in json.loads(json.dumps(settings)).items():
        if results and before.get(name) != value:
            raise UserError(f"--out: {out} holds a sweep with another {name}; delete it or choose another")
    return results


@contextmanager
def alone() -> Iterator[None]:
    """Within it, streaming takes this process for the only one, and reads all samples. There is no process group."""
    before = {name: os.environ.pop(name) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def measure(
    cell: Namespace, networks: gallery.Networks, extractor: Extractor, chosen: Choice, bar: tqdm
) -> tuple[PictureSet, dict[str, np.ndarray]]:
    """Generates this rank's share of a cell's images. The first rank gets all images' features, in order."""
    rank, ranks = gallery.my_rank()
    used = networks if cell.guide else networks._replace(weaker=None, guide=None)
    settings = {**gallery.settings_of(cell, used), "decode_batch_size": cell.decode_batch_size}
    labels, name = settings["labels"], name_of(values_of(cell))
    folder = Path(cell.out, IMAGES, name.replace(" ", "-")) if cell.keep_images else None
    collected = Collected(name, extractor, chosen)

    def keep(indices: list[int], levels: Tensor, done: Counter[str]) -> None:
        collected.add(levels.expand(-1, 3, -1, -1))
        for i, image in zip(indices, levels, strict=True) if folder else ():
            folder.mkdir(parents=True, exist_ok=True)
            gallery.write_png(gallery.as_image(image), folder / gallery.IMAGE.format(i))
        bar.update(cost(cell) * len(indices) * ranks / len(labels))

    share = list(range(len(labels)))[rank::ranks]
    work = gallery.generate_share(cell, networks.checkpoint, gallery.guided(cell, used), labels, share, keep)
    arrays, works = gather(collected.arrays()), gather(work)
    settings |= mean_work(sum(works, Counter()))
    if folder and rank == 0:
        write_json(settings, folder / gallery.SETTINGS)
    samples = PictureSet(str(folder or name), len(labels), size=collected.size)
    samples.settings = {key: value for key, value in settings.items() if key != "labels"}
    return samples, {output: interleave([part[output] for part in arrays]) for output in arrays[0]}


def gather(part: Any) -> list[Any]:
    """The parts of all ranks, on the first rank; on another, its own."""
    rank, ranks = gallery.my_rank()
    parts = [part] * ranks if rank == 0 else None
    if ranks > 1:
        dist.gather_object(part, parts)
    return parts or [part]


def interleave(parts: list[np.ndarray]) -> np.ndarray:
    """The rows of ranks, of which each had every n-th, in order."""
    whole = np.empty((sum(map(len, parts)), parts[0].shape[1]), parts[0].dtype)
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole
