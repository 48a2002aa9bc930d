"""The streaming data set and its loader: MosaicML's StreamingDataset, made safe enough to trust a result.

A shard that is missing, changed or cut short, and a remote that fails, raise a `DataError` that names the file: an
epoch is never short, and never hangs. `CheckedStream` reads the index and vouches for the shards' bytes, `SitDataset`
makes tensors of a sample, and `build_loader` batches. Pictures stay uint8; the device normalises them.
"""

import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from streaming import Stream, StreamingDataLoader, StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.format import Reader, reader_from_json
from streaming.base.hashing import get_hash, is_hash
from streaming.base.storage import CloudDownloader
from streaming.base.util import retry as retrying
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from sit_composer.errors import UserError
from sit_composer.spec import SPEC_NAME, DataSpec

INDEX_NAME = "index.json"
COLUMNS = {  # of each kind of data: their names, and how their encodings may begin
    "pixels": {"image": ("bytes",), "label": ("int", "uint")},
    "latents": {"moments": ("ndarray:float16",), "moments_flip": ("ndarray:float16",), "label": ("int", "uint")},
}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # PIL's other decoders are not for unknown files


class DataError(UserError):
    """What is wrong with the data, and where, in one line; in one line too when a DataLoader's worker raised it."""

    def __init__(self, message: str) -> None:
        lines = str(message).strip().splitlines()
        if any(line.startswith("Original Traceback") for line in lines):
            # DataLoader re-raises a worker's error as type(error)(its whole traceback); the last line has the message.
            lines = [lines[-1].partition(": ")[2]]
        super().__init__(" ".join(" ".join(lines).split()))


def load_spec(remote: str | None, local: str) -> DataSpec:
    """Reads `spec.json` from the folder ``local`` or, given a ``remote``, from there and never from a cached copy.

    Raises:
        DataError: naming the file, if it cannot be read or is not a spec.
    """
    text, uri = _read_text(_source(remote, local), local, SPEC_NAME)
    try:
        return DataSpec.from_json(text, uri)
    except ValueError as error:
        raise DataError(str(error)) from error


def _source(remote: str | None, local: str) -> str | None:
    """``remote``, or None if the shards lie in ``local`` itself, where nothing may be deleted."""
    return remote.rstrip("/") if remote and os.path.realpath(remote) != os.path.realpath(local) else None


def _read_text(remote: str | None, local: str, name: str, timeout: float = 60, attempts: int = 2) -> tuple[str, str]:
    """The text of a small file of the data set, and where it was read."""
    uri = os.path.join(remote or local, name)
    try:
        if remote is None:
            return Path(uri).read_text(), uri
        with tempfile.TemporaryDirectory() as folder:
            copy = os.path.join(folder, name)
            # Not by the stream's own client, whose open connections forked workers would share.
            retrying(num_attempts=attempts)(lambda: CloudDownloader.direct_download(uri, copy, timeout))()
            return Path(copy).read_text(), uri
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        raise DataError(f"cannot read {uri} ({cause}); check the address, and that the shards are whole") from error


class CheckedStream(Stream):
    """A folder of MDS shards, of which nothing is believed before it is checked.

    A shard is checked by its size, and by its xxh64 if the index has that (ours do), or any other hash. Every rank
    reads the index from the remote itself. A wrong file in the cache is deleted; without a remote, nothing is.
    """

    def __init__(self, spec: DataSpec, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spec = spec

    def get_shards(self, world: Any, allow_unsafe_types: bool) -> list[Reader]:
        """The shards that the index lists.

        Raises:
            DataError: if the index is missing, malformed, unsafe or unlike the spec, or local data lack a shard.
        """
        text, uri = _read_text(self.remote, self.local, INDEX_NAME, self.download_timeout, self.download_retry)
        self.index_size = len(text)
        shards = []
        try:
            for info in json.loads(text)["shards"]:
                if info["format"] != "mds":
                    raise ValueError(f"the format is {info['format']!r}, not 'mds'")
                shard = reader_from_json(self.local, self.split, info)
                shard.validate(allow_unsafe_types)
                for file in _files(shard):
                    # A name such as ../x would be written outside the cache.
                    if os.path.isabs(file.basename) or ".." in Path(file.basename).parts:
                        raise ValueError(f"the file name {file.basename!r} leads out of the folder")
                columns = dict(zip(shard.column_names, shard.column_encodings, strict=True))
                for name, encodings in COLUMNS[self.spec.kind].items():
                    if not columns.get(name, "").startswith(encodings):
                        wanted = f"a column {name!r} encoded as {' or '.join(encodings)}"
                        raise DataError(f"{uri}: {self.spec.kind} need {wanted}; the columns there are {columns}")
                if self.remote is None and (fault := self.fault(shard, hashes=False)):
                    raise DataError(f"{fault}; restore it, or write the shards again")
                shards.append(shard)
            samples = sum(shard.samples for shard in shards)
        except DataError:
            raise
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            raise DataError(f"{uri} is not a whole and safe MDS index ({cause}); write the shards again") from error
        if samples != self.spec.samples:
            raise DataError(f"{uri} lists {samples} samples, but {SPEC_NAME} says {self.spec.samples}: one is stale")
        if self.remote is not None:
            _claim_cache(self.local, self.remote)
        return shards

    def get_index_size(self) -> int:
        """The size of the index, which counts toward a ``cache_limit``."""
        return self.index_size

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: np.ndarray) -> None:
        """Notes which shards are here already."""
        if self.remote is None:
            # The stock method tidies the folder, deleting files. get_shards() has seen that every shard is there.
            cache_usage_per_shard[:] = [shard.get_raw_size() for shard in shards]
        else:
            super().set_up_local(shards, cache_usage_per_shard)

    def fault(self, shard: Reader, hashes: bool = True) -> str | None:
        """What is wrong with the shard's files here, or None."""
        files = {os.path.join(self.local, file.basename): file for file in _files(shard)}
        here = [path for path in files if os.path.exists(path)]  # the plain or the compressed one, or both
        if not here:
            return f"{next(iter(files))} is missing"
        for path in here:
            size, known = files[path].bytes, files[path].hashes
            if os.path.getsize(path) != size:
                return f"{path} has {os.path.getsize(path)} bytes; {INDEX_NAME} says {size}"
            name = next((name for name in ("xxh64", *known) if name in known and is_hash(name)), None)
            if hashes and name and get_hash(name, Path(path).read_bytes()) != known[name]:
                return f"{path} has been changed: its {name} is not what {INDEX_NAME} says"
        return None

    def prepare_shard(self, shard: Reader) -> int:
        """Fetches (and decompresses) a shard and checks it; returns by how many bytes the cache grew.

        Raises:
            Exception: whatever went wrong; then the cache has no file of the shard.
        """
        if self.remote is None and (fault := self.fault(shard, hashes=False)):
            raise FileNotFoundError(fault)
        try:
            for _ in range(2):  # bytes that came out wrong may come out right
                grown = super().prepare_shard(shard)
                fault = self.fault(shard)
                if fault is None:
                    return grown
                if self.remote is not None:
                    shard.evict()
            raise ValueError(fault)
        except Exception:
            if self.remote is not None:
                shard.evict()
            raise

    def where(self, shard: Reader) -> str:
        """The shard's file at its source."""
        return os.path.join(self.remote or self.local, _files(shard)[-1].basename)


def _files(shard: Reader) -> list[Any]:
    """The shard's plain file, and its compressed one if there is one: basename, bytes, hashes."""
    return [file for file in shard.file_pairs[0] if file]


def _claim_cache(local: str, remote: str) -> None:
    """Notes whose copies the folder holds: shards of two data sets have the same names."""
    note = Path(local, "remote.txt")
    note.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{note}.lock"):
        owner = note.read_text() if note.exists() else ""
        if not owner:
            note.write_text(remote)
    if owner not in ("", remote):
        raise DataError(f"{local} holds copies of {owner}, not of {remote}: choose another local folder, or empty it")


class SitDataset(StreamingDataset):
    """Labelled pictures or latents. A sample has ``index`` (its number in the data set), ``label`` and:

    * of pixels, ``image``: uint8 (C, H, W), cropped to ``image_size`` (None: the spec's) if it isn't of that size;
    * of latents, ``moments``: float16 (2C, H, W), of the picture or of its mirror image.

    See `build_loader` for the arguments. ``batch_size`` is a rank's; ``streaming`` are StreamingDataset's own.

    Raises:
        DataError: if anything is wrong with the data, also later, when a sample is read.
    """

    def __init__(
        self,
        *,
        remote: str | None,
        local: str,
        spec: DataSpec,
        batch_size: int,
        image_size: int | None = None,
        flip: bool = False,
        seed: int = 0,
        download_retry: int = 2,
        download_timeout: float = 60,
        cache_limit: int | str | None = None,
        **streaming: Any,
    ) -> None:
        self.spec = spec
        self.image_size = image_size or spec.image_size
        if spec.kind == "pixels" and self.image_size is None:
            raise DataError(f"the pictures of {remote or local} differ in size; say to which image_size to crop them")
        self.flip = flip
        self.epoch = 0
        self.prefetch_failed: set[int] = set()
        remote = _source(remote, local)
        download = {"download_retry": download_retry, "download_timeout": download_timeout}
        for attempts_left in reversed(range(10)):
            try:
                self.stream = CheckedStream(spec, remote=remote, local=local, **download)
                super().__init__(
                    streams=[self.stream],
                    batch_size=batch_size,
                    shuffle_seed=seed,
                    cache_limit=cache_limit if remote else None,  # it would delete the source
                    **streaming,
                )
                break
            except DataError:
                raise
            except (ValueError, RuntimeError, OSError) as error:
                # Two jobs that start on a machine at the same moment choose the same name for their shared memory. Of
                # several ranks the others wait for this one in the middle of it, and cannot choose again.
                collision = isinstance(error, FileExistsError) and self._unique_rank_world.ranks_per_node == 1
                if not (collision and attempts_left):
                    raise DataError(f"cannot stream {remote or local}: {error}") from error
        # What was here before this run is checked by each process when it first touches it.
        self.unchecked = set(np.flatnonzero(self._shard_states.numpy() == _ShardState.LOCAL).tolist())
        # A job killed before its first batch leaves shared memory for which the next is refused ("Reused local
        # directory"). The library passes over a name with this lock file, but makes the file at the first batch only.
        Path(self._cache_filelock_path).touch()

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """The sample of that number; its shard is fetched first if need be."""
        index = int(sample_id)
        shard_id = int(self.spanner[index][0])
        try:
            self._ensure_shard(shard_id)
            return self._tensors(index, super().get_item(index, retry))
        except DataError:
            raise
        except Exception as error:
            where = self.stream.where(self.shards[shard_id])
            raise DataError(f"sample {index}, in {where}: {type(error).__name__}: {error}") from error

    def _tensors(self, index: int, row: dict[str, Any]) -> dict[str, Any]:
        flip = self.flip and coin(self.shuffle_seed, self.epoch, index)
        if self.spec.kind == "pixels":
            image = center_crop(decode_image(row["image"], self.spec.channels), self.image_size)
            sample = {"image": image.flip(-1) if flip else image}
        else:
            moments = row["moments_flip" if flip else "moments"]
            if moments.ndim != 3 or moments.shape[0] != 2 * self.spec.channels:
                raise ValueError(f"moments are {moments.shape}, but {SPEC_NAME} says {self.spec.channels} channels")
            sample = {"moments": torch.tensor(moments)}
        label = int(row["label"])
        if not 0 <= label < self.spec.num_classes:
            raise ValueError(f"label {label}, but {SPEC_NAME} has {self.spec.num_classes} classes")
        return {**sample, "label": label, "index": index}

    def _ensure_shard(self, shard_id: int) -> None:
        """Sees to it that the shard is here, and was checked by this process or by the one that fetched it."""
        if shard_id in self.unchecked:
            fault = self.stream.fault(self.shards[shard_id])
            if fault and self.stream.remote is None:
                raise DataError(f"{fault}; restore it, or write the shards again")
            if fault:
                with FileLock(self._cache_filelock_path):
                    # Another process may be fetching it again, or have done so.
                    local = self._shard_states[shard_id] == _ShardState.LOCAL
                    if local and self.stream.fault(self.shards[shard_id]):
                        self._evict_shard(shard_id)
            self.unchecked.discard(shard_id)
        if self._shard_states[shard_id] != _ShardState.LOCAL:
            self.prepare_shard(shard_id)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetches a shard; if ``blocking``, until it is here or this process's own attempt has failed."""
        if not blocking and not self.cache_limit and self._shard_states[shard_id] == _ShardState.LOCAL:
            return  # the stock method would take a file lock, for every sample that is prefetched
        while not (shard_id in self.prefetch_failed and not blocking):
            try:
                super().prepare_shard(shard_id, blocking)
            except Exception as error:
                # The stock method leaves it PREPARING, and everyone waiting for ever.
                self._shard_states[shard_id] = _ShardState.REMOTE
                if blocking:
                    where = self.stream.where(self.shards[shard_id])
                    raise DataError(f"cannot read the shard {where}: {type(error).__name__}: {error}") from error
                self.prefetch_failed.add(shard_id)  # get_item() will try again, and raise
            if not blocking or self._shard_states[shard_id] == _ShardState.LOCAL:
                break

    # A shard that fails in the background makes the stock epoch end early, or hang; one that a cache_limit evicts at
    # the wrong moment makes it hang as well: the samples wait for a "ready" thread, which waits for ever. Here the
    # background only fetches ahead: get_item() itself waits for what it needs, or raises.
    def _ready_thread(self, it: Any) -> None:
        it.on_exit()

    def _each_sample_id(self, it: Any) -> Iterator[int]:
        for sample_id in it.sample_ids:
            if it.should_exit():
                break
            if sample_id != -1:
                yield sample_id
            it.yield_index += 1
        it.on_exit()

    def _resume_incr_epoch(self) -> tuple[int, int]:
        self.epoch, sample_in_epoch = super()._resume_incr_epoch()  # at an epoch's start, in each process that reads
        return self.epoch, sample_in_epoch

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where the run is, for a checkpoint; ``num_samples`` counts those of all ranks."""
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            # Composer's checkpoint at an epoch's end counts 0 samples of the next one. The stock method takes that for
            # the start of the epoch just done, whose order and flips a resumed run would then see again.
            state["epoch"] = max(state["epoch"], self.next_epoch)
        return state


def coin(seed: int, epoch: int, index: int) -> bool:
    """A fair coin, the same for the same arguments, whoever tosses it (splitmix64 of each in turn)."""
    mask, x = 2**64 - 1, 0
    for word in (seed, epoch, index):
        x = (x + word + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
    return bool(x & 1)


def decode_image(data: bytes, channels: int) -> torch.Tensor:
    """Decodes a picture's file to uint8 (channels, H, W): grey if ``channels`` is 1, RGB if 3.

    What is transparent shows white; 16 bits a channel become 8; an animation gives its first frame; a rotation noted
    in EXIF is left alone, as ADM does.

    Raises:
        Exception: PIL's, if it cannot be read.
    """
    if data[:2] == b"\xff\xd8":  # JPEG: a third faster than by PIL, with the same RGB
        try:
            mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode)
        except RuntimeError:
            pass  # PIL reads a few more kinds, and says better what is wrong
    with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
        if picture.mode.startswith("I;16"):  # convert() would clip it
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        if picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return tvf.pil_to_tensor(picture.convert("L" if channels == 1 else "RGB"))


def center_crop(image: torch.Tensor, size: int) -> torch.Tensor:
    """Resizes the short side of uint8 (C, H, W) to ``size`` and crops the centre, as ADM does: (C, size, size)."""
    if image.shape[-2:] == (size, size):
        return image
    if min(image.shape[-2:]) >= 2 * size:
        picture = Image.fromarray(image.permute(1, 2, 0).numpy().squeeze())
        while min(picture.size) >= 2 * size:
            picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
        image = tvf.pil_to_tensor(picture)
    scale = size / min(image.shape[-2:])
    height, width = (round(side * scale) for side in image.shape[-2:])
    image = tvf.resize(image, [height, width], interpolation=InterpolationMode.BICUBIC, antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    return image[:, top : top + size, left : left + size]


class SitLoader(StreamingDataLoader):
    """A StreamingDataLoader that stops its workers when one of them fails."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        try:
            yield from super().__iter__()
        except Exception:
            # Left to the garbage collector, they are waited for five seconds each before the program ends.
            if self._iterator is not None:
                self._iterator._shutdown_workers()
                self._iterator = None
            raise


def build_loader(
    remote: str | None,
    local: str,
    *,
    spec: DataSpec,
    batch_size: int,
    image_size: int | None = None,
    flip: bool = False,
    shuffle: bool = True,
    seed: int = 0,
    num_workers: int = 0,
    drop_last: bool = True,
    **options: Any,
) -> SitLoader:
    """A loader of dicts: ``image`` or ``moments`` of `SitDataset`, stacked, and int64 ``label`` and ``index`` (N,).

    Args:
        remote: Folder or URI (s3://, gs://, …) of the shards; None if they are in ``local``.
        local: The folder of the shards, or of the local copies of the remote ones: one folder for every running job.
        spec: What the shards hold, as of `load_spec`.
        batch_size: Samples a batch and rank. All ranks have equally many batches, for which an epoch may repeat a few
            samples; with ``drop_last`` every batch is full.
        image_size: Side in pixels to which pictures are cropped; None for the spec's. Of no meaning for latents.
        flip: Mirror half of the samples, in each epoch others; which is a function of seed, epoch and index alone.
        shuffle: Another order each epoch, a function of ``seed`` and epoch, whatever the number of workers and ranks.
        num_workers: Processes a rank that read; with 0 this one does.
        options: predownload (samples whose shards a worker fetches ahead; 8 batches), cache_limit (bytes or "100gb",
            of at least four shards; without a remote it means nothing), download_retry (attempts to fetch a file, 2),
            download_timeout (60 seconds), epoch_size, num_canonical_nodes, shuffle_algo, shuffle_block_size: all as
            StreamingDataset has them.

    Raises:
        DataError: if anything is wrong with the data; while iterating too, with any number of workers.
    """
    dataset = SitDataset(
        remote=remote,
        local=local,
        spec=spec,
        batch_size=batch_size,
        image_size=image_size,
        flip=flip,
        shuffle=shuffle,
        seed=seed,
        **options,
    )
    return SitLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        prefetch_factor=2 if num_workers else None,
        # Each pass over a DataLoader draws a seed for its workers; from torch's own generator, an evaluation would
        # change the noise of the training after it.
        generator=torch.Generator(),
    )
