"""The folder of a run's checkpoints, on a file system or in object storage: what is in it, and which is the newest.

A checkpoint is there or it isn't: what a kill left half written or half uploaded is never resumed from. A file is
whole if its archive can be opened, whose table is written last (an object in S3 appears as a whole anyway); a sharded
one if its metadata is there, written last, and every file that it names is, with the bytes that it speaks of.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sit_composer.checkpoint.safe_load import METADATA, CheckpointError, load_metadata, sharded_files
from sit_composer.storage import LocalFolder, RunFolder, S3Folder, StorageError

CHECKPOINT = re.compile(r"ep(\d+)-ba(\d+)(-rank0\.pt)?")  # a file of all, or a folder of shards
SHARD = re.compile(r"\.metadata|__\d+_\d+\.distcp")  # no other name is touched: it could lead out of the folder


def checkpoints(folder: RunFolder) -> dict[str, list[str]]:
    """The names of checkpoints, whole or not, from the oldest to the newest, with their files' names."""
    found: dict[str, list[str]] = {}
    for name in folder.listing():
        top, _, file = name.partition("/")
        if CHECKPOINT.fullmatch(top) and (SHARD.fullmatch(file) if file else top.endswith(".pt")):
            found.setdefault(top, []).append(name)

    def age(name: str) -> tuple[int, int]:
        epoch, batch, _ = CHECKPOINT.fullmatch(name).groups()
        return int(batch), int(epoch)

    return {name: found[name] for name in sorted(found, key=age)}


def is_complete(folder: RunFolder, name: str, sizes: dict[str, int]) -> bool:
    """Whether the checkpoint of that name can be resumed from; sizes is the folder's listing.

    Raises:
        StorageError: if that can't be read, which is no sign that it is incomplete.
    """
    if name.endswith(".pt"):
        return folder.is_whole(name)
    where = f"{folder.uri}/{name}/{METADATA}"
    content = folder.read(f"{name}/{METADATA}")
    if content is None:
        return False
    try:
        needed = sharded_files(load_metadata(content, where))
    except CheckpointError as error:
        if content.endswith(b"."):  # the last byte of a whole pickle, which this program doesn't know
            raise StorageError(f"{error}; move the checkpoint away to go on from an older one") from None
        return False
    return bool(needed) and all(sizes.get(f"{name}/{file}", -1) >= size for file, size in needed.items())


def newest(folder: RunFolder) -> str | None:
    """The name of the newest complete checkpoint."""
    sizes = folder.listing()
    return next((name for name in reversed(checkpoints(folder)) if is_complete(folder, name, sizes)), None)


def prune(folder: RunFolder, keep: int) -> None:
    """Deletes all but the newest ``keep`` complete checkpoints (at least one), and incomplete ones older than those."""
    sizes, found, kept = folder.listing(), checkpoints(folder), 0
    for name in reversed(found):
        if kept >= max(keep, 1):
            # The metadata first: without it the rest is no checkpoint, whenever this is interrupted.
            folder.delete(sorted(found[name], key=lambda file: not file.endswith(METADATA)))
        elif is_complete(folder, name, sizes):
            kept += 1


def clear_incomplete(folder: RunFolder) -> None:
    """Deletes what an earlier run left half done after its newest complete checkpoint.

    So that the files of a checkpoint that is written again are all of one writing.

    Raises:
        StorageError: if there are several and none is complete, which no kill leaves behind. All are left alone.
    """
    found, last = checkpoints(folder), newest(folder)
    if last is None and len(found) > 1:
        raise StorageError(
            f"{folder.uri}: none of its {len(found)} checkpoints is whole. If nodes save here, all must see the same "
            "folder; else move them away, or choose another run_name"
        )
    for name in reversed(found):
        if name == last:
            break
        folder.delete(sorted(found[name], key=lambda file: not file.endswith(METADATA)))


def fetch_checkpoint(folder: S3Folder, name: str, place: Path) -> None:
    """Downloads a checkpoint, a file or a folder, into the folder ``place``.

    Raises:
        StorageError: if it can't be had, whole.
    """
    sizes, files = folder.listing(), checkpoints(folder).get(name, [])
    for file in files:
        (place / file).parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda file: folder.download(file, place / file), files))
    local = LocalFolder(str(place))
    if not all(local.listing().get(file) == sizes[file] for file in files) or not is_complete(local, name, sizes):
        raise StorageError(f"{folder.uri}/{name}: did not come whole")
