"""What makes a run survive: it resumes from the newest complete checkpoint, its checkpoints reach the object store, no
other run writes beside it, and a SIGTERM saves before it ends.

Composer saves to a local folder, always. Its own uploads to a store go on in processes that outlive the run, its resume
looks for a link that is written half a minute after the checkpoint, and takes what an earlier resume downloaded for
the newest; so uploading, finding and pruning are done here, on threads that end with the run.
"""

import ctypes
import getpass
import hashlib
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from composer import Trainer
from composer import algorithms as composer_algorithms
from composer.callbacks import CheckpointSaver
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist, format_name_with_dist

from sit_composer.checks import CONFIG, check_same_config
from sit_composer.config import Config, ConfigError
from sit_composer.lease import Lease
from sit_composer.names import EVICTED
from sit_composer.run_folder import (
    METADATA,
    RunFolder,
    S3Folder,
    StorageError,
    checkpoints,
    clear_incomplete,
    fetch_checkpoint,
    newest,
    open_run_folder,
    prune,
)
from sit_composer.safe_load import load_metadata, sharded_files

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>: be sent a signal when the parent dies


class Evicted(Exception):
    """The run was told to end, and has saved."""


class Supervision:
    """Holds a run's folder from its start to its end. Every rank makes one, and calls it in the same order."""

    def __init__(self, config: Config):
        self.config = config
        self.resumes = bool(config.trainer.get("autoresume"))
        uri = config.trainer.get("save_folder")
        self.uri = format_name_with_dist(uri, config.run_name) if uri else None
        self.folder: RunFolder | None = open_run_folder(self.uri) if self.uri else None
        self.eviction = Eviction(config.supervision.grace)
        self.uploads: Uploads | None = None
        self.lease: Lease | None = None
        # In temporary storage, by the run's name, so that what a killed run left there is found and removed.
        name = hashlib.sha256(f"{self.uri} {dist.get_node_rank()}".encode()).hexdigest()[:16]
        self.staging = Path(tempfile.gettempdir(), f"sit_composer-{getpass.getuser()}-{name}")

    def start(self) -> dict[str, Any]:
        """Takes the folder, and gives the Trainer's arguments that say where to save and what to resume from.

        Raises:
            ConfigError, StorageError: if a live run has it, it holds a run that isn't to be resumed, or it can't be
                read or written.
        """
        self.eviction.install()
        if self.folder is None:
            return {}
        owner = _from_rank_0(self._acquire)
        self.lease = self.lease or Lease(self.folder, self.config.supervision.heartbeat, owner)
        name = _from_rank_0(self._find)
        arguments: dict[str, Any] = {"save_overwrite": self.resumes or self.config.trainer.get("save_overwrite", False)}
        if isinstance(self.folder, S3Folder):
            if dist.get_local_rank() == 0:
                shutil.rmtree(self.staging, ignore_errors=True)
                self.staging.mkdir(mode=0o700)
            dist.barrier()
            place = self.staging / f"rank{dist.get_global_rank()}"
            arguments |= {"save_folder": str(place), "save_num_checkpoints_to_keep": -1}
            keep = self.config.trainer.get("save_num_checkpoints_to_keep", -1)
            self.uploads = Uploads(self.folder, self.lease, keep, self.config.supervision.patience)
        if name is not None:
            arguments |= {"load_path": str(self._local(name)), "load_weights_only": False, "load_ignore_keys": None}
        return arguments

    def _acquire(self) -> str:
        lease = Lease(self.folder, self.config.supervision.heartbeat)
        try:
            lease.acquire()
        except StorageError as error:
            raise ConfigError(f"trainer.save_folder: {error}") from error
        self.lease = lease
        return lease.owner

    def _find(self) -> str | None:
        """The checkpoint to resume from, once what a kill left incomplete is gone."""
        found = checkpoints(self.folder)
        if self.resumes:
            before = self.folder.read(CONFIG)
            if before is not None:
                check_same_config(self.config, before.decode(), f"{self.uri}/{CONFIG}")
            clear_incomplete(self.folder)
            return newest(self.folder)
        if found and not self.config.trainer.get("save_overwrite"):
            raise ConfigError(
                f"trainer.save_folder: {self.uri} holds checkpoints ({list(found)[-1]}); trainer.autoresume=true goes "
                "on from there, or choose another run_name"
            )
        return None

    def _local(self, name: str) -> Path:
        """Where this node has the checkpoint of that name."""
        sharded, wanted = not name.endswith(".pt"), self.config.fsdp
        if sharded != (wanted is not None and wanted.state_dict_type == "sharded"):
            advice = (
                "fsdp.state_dict_type=sharded reads it" if sharded else "fsdp=null or fsdp.state_dict_type=full does"
            )
            raise ConfigError(
                f"fsdp: {self.uri}/{name} is {'a sharded' if sharded else 'an unsharded'} checkpoint; {advice}"
            )
        if not isinstance(self.folder, S3Folder):
            if not (Path(self.uri) / name).exists():
                raise ConfigError(f"trainer.save_folder: node {dist.get_node_rank()} doesn't see {self.uri}/{name}")
            return Path(self.uri) / name
        if dist.get_local_rank() == 0:
            fetch_checkpoint(self.folder, name, self.staging / "resume")
        dist.barrier()
        return self.staging / "resume" / name

    def attach(self, trainer: Trainer) -> None:
        """Called with the trainer, which has loaded the checkpoint."""
        shutil.rmtree(self.staging / "resume", ignore_errors=True)
        saver = trainer._checkpoint_saver
        self.eviction.saver = saver
        if self.uploads is not None:
            self.uploads.saver = saver
            trainer.state.callbacks.append(self.uploads)  # behind the saver
        self.eviction.before_leaving = self.finish
        trainer.state.callbacks.append(self.eviction)

    def finish(self) -> None:
        """Waits until all that was saved is where it belongs."""
        if self.uploads is not None:
            self.uploads.wait()
        if dist.get_world_size() > 1:
            dist.barrier()

    def close(self) -> None:
        """Lets go of the folder."""
        if self.uploads is not None:
            self.uploads.end()
            if dist.get_local_rank() == 0:
                shutil.rmtree(self.staging, ignore_errors=True)
        if self.lease is not None and dist.get_global_rank() == 0:
            self.lease.release()


def excluded_algorithms() -> list[str]:
    """The algorithms that Composer makes by evaluating a checkpoint's text, if that asks for them. None is needed."""
    return [name for name, c in vars(composer_algorithms).items() if getattr(c, "required_on_load", bool)()]


class Uploads(Callback):
    """Uploads each checkpoint while training goes on, one at a time, and prunes the old ones there.

    Args:
        folder: where to.
        lease: must be held, or nothing more is written.
        keep: how many complete checkpoints stay; -1: all.
        patience: seconds for which a failing upload is tried again.
    """

    def __init__(self, folder: S3Folder, lease: Lease, keep: int, patience: float):
        self.folder = folder
        self.lease = lease
        self.keep = keep
        self.patience = patience
        self.saver: CheckpointSaver | None = None
        self.failure: StorageError | None = None
        self._seen = 0
        self._jobs: queue.Queue[Callable[[], None]] = queue.Queue()
        threading.Thread(target=self._work, name="uploads", daemon=True).start()

    def batch_start(self, state: State, logger: Logger) -> None:
        self.check()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self._take()

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self._take()

    def fit_end(self, state: State, logger: Logger) -> None:
        self._take()
        self.wait()

    def check(self) -> None:
        """Raises what made an upload fail for good, or the loss of the lease."""
        if self.failure is not None:
            raise self.failure
        if self.lease.lost is not None:
            raise StorageError(self.lease.lost)

    def wait(self) -> None:
        """Waits for all uploads."""
        self._jobs.join()
        self.check()

    def end(self) -> None:
        """Takes no more."""
        self._jobs.put(None)

    def _take(self) -> None:
        new = self.saver.saved_checkpoints[self._seen :]
        self._seen += len(new)
        for path in new:
            if self._jobs.unfinished_tasks:  # local space for two checkpoints is enough
                self.wait()
            self._jobs.put(Path(path))

    def _work(self) -> None:
        while (path := self._jobs.get()) is not None:
            try:
                if self.failure is None:
                    self._upload(path)
            except StorageError as error:
                self.failure = error
            except Exception as error:  # a bug, or a local disk that fails: training must hear of it too
                self.failure = StorageError(f"{self.folder.uri}: {type(error).__name__}: {error}")
            finally:
                self._jobs.task_done()

    def _upload(self, path: Path) -> None:
        place = path.parent
        if path.suffix == ".pt":
            self._patiently(lambda: self._put(path, path.name))
            path.unlink()
        else:
            name = place.name  # ep0-ba10/__RANK_0.distcp
            for shard in sorted(place.glob(f"{path.name.rpartition('_')[0]}_*.distcp")):
                self._patiently(lambda shard=shard: self._put(shard, f"{name}/{shard.name}"))
                shard.unlink()
            metadata = place / METADATA
            if metadata.exists():  # rank 0's, and the last of all
                needed = sharded_files(load_metadata(metadata.read_bytes(), str(metadata)))
                self._patiently(lambda: self._expect(name, needed))
                self._patiently(lambda: self._put(metadata, f"{name}/{METADATA}"))
                metadata.unlink()
        if dist.get_global_rank() == 0 and self.keep >= 0:
            self._patiently(lambda: (self.lease.check(), prune(self.folder, self.keep)))

    def _put(self, file: Path, name: str) -> None:
        self.lease.check()
        self.folder.upload(file, name)

    def _expect(self, name: str, needed: dict[str, int]) -> None:
        """Raises StorageError if a file that another rank uploads isn't there yet."""
        sizes = self.folder.listing()
        late = [file for file, size in needed.items() if sizes.get(f"{name}/{file}", -1) < size]
        if late:
            raise StorageError(f"{self.folder.uri}/{name}/{late[0]}: its rank hasn't uploaded it")

    def _patiently(self, action: Callable[[], Any]) -> None:
        deadline, pause = time.monotonic() + self.patience, 0.5
        while True:
            try:
                action()
                return
            except StorageError as error:
                if self.lease.lost is not None or time.monotonic() + pause > deadline:
                    raise
                if pause > 4:  # what waits for other ranks is no news at first
                    print(f"warning: {error}; trying again for {self.patience:.0f} s", file=sys.stderr, flush=True)
                time.sleep(pause)
                pause = min(2 * pause, 30)


class Eviction(Callback):
    """After a SIGTERM: saves at the end of the batch, on all ranks at the same one, and ends the run.

    Args:
        grace: seconds that this may take; then the process ends as it is.
    """

    def __init__(self, grace: float):
        self.grace = grace
        self.saver: CheckpointSaver | None = None
        self.before_leaving: Callable[[], None] = lambda: None
        self._told = False
        self._agreed = False
        self._asked: tuple[Any, torch.Tensor] | None = None
        self._group: Any = None

    def install(self) -> None:
        """Listens from now on; until training starts, a SIGTERM ends the process at once."""
        signal.signal(signal.SIGTERM, self._hear)
        if "LOCAL_RANK" in os.environ and sys.platform == "linux":
            # Composer's launcher dies of a signal without a word to its ranks, which would train on, alone.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def fit_start(self, state: State, logger: Logger) -> None:
        self._training = True
        if dist.get_world_size() > 1:
            self._group = torch.distributed.new_group(backend="gloo")
        if self.saver is not None:
            regular = self.saver.save_interval
            self.saver.save_interval = lambda state, event: (
                regular(state, event) or (self._agreed and event == Event.BATCH_CHECKPOINT)
            )

    _training = False

    def _hear(self, number: int, frame: Any) -> None:
        if not self._training:
            os._exit(EVICTED)
        if not self._told:
            self._told = True
            timer = threading.Timer(self.grace, os._exit, (EVICTED,))
            timer.daemon = True
            timer.start()

    def batch_end(self, state: State, logger: Logger) -> None:
        # Ranks hear it at different moments. What they heard is summed while the next batch is computed, on the CPU, so
        # that no rank waits for another or for its GPU, and all of them know at the end of the same batch.
        if self._group is None:
            self._agreed = self._told
            return
        if self._asked is not None:
            work, heard = self._asked
            work.wait()
            self._agreed = bool(heard.item())
        heard = torch.tensor([int(self._told)])
        self._asked = torch.distributed.all_reduce(heard, group=self._group, async_op=True), heard

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self._agreed:  # the saver has saved
            self.before_leaving()
            raise Evicted


def _from_rank_0(find: Callable[[], Any]) -> Any:
    """What rank 0 finds, on every rank; an error of its is raised on every rank."""
    found: list[Any] = [None]
    if dist.get_global_rank() == 0:
        try:
            found = [(find(), None)]
        except (StorageError, ConfigError) as error:
            found = [(None, error)]
    dist.broadcast_object_list(found)
    value, error = found[0]
    if error is not None:
        raise error
    return value
