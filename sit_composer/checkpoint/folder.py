"""The folder of a run's checkpoints, on a file system or in object storage: which are complete, and which is newest.

Only a complete checkpoint is resumed from, never one that a kill left half written or half uploaded. A file is complete
if its archive can be opened, whose table is written last (an object in a store appears as a whole anyway). A sharded
one is complete if its metadata, written last, exists, and every file that it names has at least the bytes it names.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path

from sit_composer.checkpoint.safe_load import METADATA, CheckpointError
from sit_composer.storage import LocalFolder, RemoteFolder, RunFolder, StorageError

CHECKPOINT = re.compile(r"ep(\d+)-ba(\d+)(-rank0\.pt)?")  # a file, or a folder of shards
SHARD = re.compile(r"\.metadata|__\d+_\d+\.distcp")  # other names are ignored: they could lead out of the folder


def checkpoints(folder: RunFolder, sizes: dict[str, int] | None = None) -> dict[str, list[str]]:
    """The names of all checkpoints, complete or not, from the oldest to the newest, with their files' names.

    ``sizes`` is the folder's listing, if it was made already.
    """
    found: dict[tuple[int, int, str], list[str]] = {}
    for name in folder.listing() if sizes is None else sizes:
        top, _, file = name.partition("/")
        match = CHECKPOINT.fullmatch(top)
        if match and (SHARD.fullmatch(file) if file else top.endswith(".pt")):
            found.setdefault((int(match[2]), int(match[1]), top), []).append(name)
    return {key[2]: found[key] for key in sorted(found, key=lambda key: key[:2])}


def is_complete(folder: RunFolder, name: str, sizes: dict[str, int]) -> bool:
    """Whether a checkpoint can be resumed from; sizes is the folder's listing. StorageError if it can't be read."""
    if name.endswith(".pt"):
        return folder.is_whole(name)
    content, where = folder.read(f"{name}/{METADATA}"), f"{folder.uri}/{name}/{METADATA}"
    if content is None:
        return False
    from sit_composer.checkpoint.sharded import load_metadata, sharded_files  # takes seconds to import

    try:
        needed = sharded_files(load_metadata(content, where))
    except CheckpointError as error:
        if content.endswith(b"."):  # the last byte of a whole pickle, but one of an unknown kind
            reason = str(error).removeprefix(f"{where}: ")
            raise StorageError(f"{where}: {reason}; move the checkpoint away to resume from an older one") from None
        return False
    return bool(needed) and all(sizes.get(f"{name}/{file}", -1) >= size for file, size in needed.items())


def newest(folder: RunFolder) -> str | None:
    """The name of the newest complete checkpoint."""
    sizes = folder.listing()
    return next((name for name in reversed(checkpoints(folder, sizes)) if is_complete(folder, name, sizes)), None)


def meant(folder: RunFolder) -> str:
    """A hint for a folder without checkpoints whose folder of that name is likely to have them."""
    below = isinstance(folder, LocalFolder) and (folder.path / "checkpoints").is_dir()
    return f"; did you mean {folder.uri}/checkpoints?" if below else ""


def prune(folder: RunFolder, keep: int) -> None:
    """Deletes all but the newest ``keep`` complete checkpoints (at least one), and incomplete ones older than those."""
    sizes, kept = folder.listing(), 0
    found = checkpoints(folder, sizes)
    for name in reversed(found):
        if kept >= max(keep, 1):
            _delete(folder, found[name])
        elif is_complete(folder, name, sizes):
            kept += 1


def clear_incomplete(folder: RunFolder) -> None:
    """Deletes incomplete checkpoints newer than the newest complete one, so that no old file mixes with new ones.

    If there are several and none is complete, which no kill causes, all are kept, and StorageError is raised.
    """
    found, last = checkpoints(folder), newest(folder)
    if last is None and len(found) > 1:
        what = f"got {len(found)} checkpoints, expected at least one complete. If several nodes save here, all must see"
        raise StorageError(f"{folder.uri}: {what} the same folder; else move them away, or choose another run_name")
    for name in takewhile(lambda name: name != last, reversed(found)):
        _delete(folder, found[name])


def _delete(folder: RunFolder, files: list[str]) -> None:
    """Deletes a checkpoint's files, the metadata first: the rest alone is incomplete if this is interrupted."""
    folder.delete(sorted(files, key=lambda file: not file.endswith(METADATA)))


def fetch_checkpoint(folder: RemoteFolder, name: str, place: Path) -> None:
    """Downloads a checkpoint, a file or a folder, into the folder ``place``; raises StorageError if incomplete."""
    sizes = folder.listing()
    files = checkpoints(folder, sizes).get(name, [])
    for file in files:
        (place / file).parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda file: folder.download(file, place / file), files))
    local = LocalFolder(str(place))
    if not all(local.listing().get(file) == sizes[file] for file in files) or not is_complete(local, name, sizes):
        raise StorageError(f"{folder.uri}/{name}: the download is incomplete")
