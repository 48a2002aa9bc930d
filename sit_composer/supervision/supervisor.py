"""Keeps a run alive: resumes from the newest complete checkpoint, uploads, holds the lease, saves after a SIGTERM.

Composer always saves to a local folder here. Its own uploads outlive the run; its resume looks for a link written half
a minute after the checkpoint, and reuses what an earlier resume downloaded. So both, and pruning, are done here.
"""

import hashlib
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.callbacks import CheckpointSaver
from composer.core import State
from composer.loggers import Logger
from composer.utils import checkpoint, dist, format_name_with_dist
from omegaconf import OmegaConf

from sit_composer.checkpoint import metrics
from sit_composer.checkpoint.folder import checkpoints, clear_incomplete, fetch_checkpoint, newest, prune
from sit_composer.cli import say
from sit_composer.config.same_run import CONFIG, check_same_config
from sit_composer.config.schema import Config, ConfigError
from sit_composer.errors import one_line
from sit_composer.outputs import write_bytes
from sit_composer.page import GRID, REPORT, report_page
from sit_composer.storage import LocalFolder, RunFolder, StorageError, open_run_folder
from sit_composer.supervision.eviction import Eviction
from sit_composer.supervision.lease import Lease
from sit_composer.supervision.uploads import Uploads


class Supervision:
    """Holds a run's folder from start to end. Every rank has one, and makes the same calls in the same order."""

    def __init__(self, config: Config, timeout: float):  # for how many seconds a rank waits for the others
        self.config = config
        self.keep: int = config.trainer.get("save_num_checkpoints_to_keep", -1)
        uri = config.trainer.get("save_folder")
        self.uri = format_name_with_dist(uri, config.run_name) if uri else None
        self.folder: RunFolder | None = open_run_folder(self.uri) if self.uri else None
        self.eviction = Eviction(config.supervision.grace, timeout)
        self.uploads: Uploads | None = None
        self.lease: Lease | None = None
        self.flush_metrics: Callable[[], None] = lambda: None  # on rank 0 it appends what was logged
        self.metrics: metrics.MetricsFile | None = None  # on rank 0
        self._uploaded = self._reported = 0  # bytes of metrics when these and the page were last written
        self.before_save: Callable[[State, Logger], None] = lambda *_: None  # raises what forbids to save
        self._outdated: list[str] = []  # files of an earlier run that this one replaces
        # In temporary storage, named by the run, so that a killed run's leftovers are found and removed.
        name = hashlib.sha256(f"{self.uri} {dist.get_node_rank()}".encode()).hexdigest()[:16]
        self.staging = Path(tempfile.gettempdir(), f"sit_composer-{os.getuid()}-{name}")

    def start(self) -> dict[str, Any]:
        """Acquires the folder. Returns the Trainer's arguments that say where to save and what to resume from."""
        self.eviction.install()
        if self.folder is None:
            return {}
        owner = from_rank_0(self._acquire)
        self.lease = self.lease or Lease(self.folder, self.config.supervision.heartbeat, owner)
        self.lease.check()  # also that every rank sees the same folder
        self.eviction.check = self.lease.raise_if_lost
        name = from_rank_0(self._find)
        # Composer counts anew at each start, and deletes the newest too. Pruning is done here.
        arguments: dict[str, Any] = {"save_num_checkpoints_to_keep": -1}
        if not isinstance(self.folder, LocalFolder):
            arguments["save_folder"] = self._stage()
            self.uploads = Uploads(self.folder, self.lease, self.keep, self.config.supervision.patience)
            self.eviction.check = self.uploads.check
        if name is not None:
            arguments |= {"load_path": str(self._local(name)), "load_weights_only": False, "load_ignore_keys": None}
        return arguments

    def _stage(self) -> str:
        """Makes the empty folder that holds this rank's checkpoints until they are uploaded."""
        if dist.get_local_rank() == 0:
            shutil.rmtree(self.staging, ignore_errors=True)
            try:
                self.staging.mkdir(mode=0o700)
            except OSError as error:
                raise StorageError(f"{self.staging}: {error.strerror}; set TMPDIR to another folder") from error
        dist.barrier()
        return str(self.staging / f"rank{dist.get_global_rank()}")

    def _acquire(self) -> str:
        lease = Lease(self.folder, self.config.supervision.heartbeat)
        try:
            lease.acquire()
        except StorageError as error:
            raise ConfigError(f"trainer.save_folder: {error}") from error
        self.lease = lease
        return lease.owner

    def _find(self) -> str | None:
        """The checkpoint to resume from. Deletes first what a kill left incomplete."""
        self.metrics = metrics.MetricsFile(self.folder)
        found = checkpoints(self.folder)
        if self.config.trainer.get("autoresume"):
            before = self.folder.read(CONFIG)
            if before is not None:
                check_same_config(self.config, before.decode(), f"{self.uri}/{CONFIG}")
            clear_incomplete(self.folder)
            if self.keep >= 0 and (count := len(found) - max(self.keep, 1)) > 0:
                keys = f"trainer.save_num_checkpoints_to_keep is {self.keep}, -1 keeps all"
                say(f"{self.uri}: {count} old checkpoints will be deleted with the next save ({keys})")
            return newest(self.folder)
        if found and self.config.trainer.get("save_overwrite"):
            # Their batches may be later, and would count as newer than this run's.
            others = [name for name in self.folder.listing() if GRID.fullmatch(name) or name in (metrics.NAME, REPORT)]
            self._outdated = [*(file for files in found.values() for file in files), *others]
        elif found:
            advice = "trainer.autoresume=true resumes from them, or choose another run_name"
            raise ConfigError(f"trainer.save_folder: {self.uri} holds checkpoints ({list(found)[-1]}); {advice}")
        return None

    def _local(self, name: str) -> Path:
        """The checkpoint of that name on this node."""
        sharded, fsdp = not name.endswith(".pt"), self.config.fsdp
        if sharded != (fsdp is not None and fsdp.state_dict_type == "sharded"):
            kind = "a sharded" if sharded else "an unsharded"
            keys = "fsdp.state_dict_type=sharded" if sharded else "fsdp=null or fsdp.state_dict_type=full"
            raise ConfigError(f"fsdp: {self.uri}/{name} is {kind} checkpoint, expected {keys}")
        if isinstance(self.folder, LocalFolder):
            path = Path(self.uri, name)
            if not path.exists():
                raise ConfigError(f"trainer.save_folder: node {dist.get_node_rank()} doesn't see {path}")
            return path
        if dist.get_local_rank() == 0:
            fetch_checkpoint(self.folder, name, self.staging / "resume")
        dist.barrier()
        return self.staging / "resume" / name

    def save_config(self) -> None:
        """Writes the resolved config beside the run's checkpoints."""
        if self.folder is not None and dist.get_global_rank() == 0:
            self.folder.write(CONFIG, OmegaConf.to_yaml(OmegaConf.structured(self.config)).encode())

    def append_metrics(self, content: bytes) -> None:
        """Appends lines to the run's metrics; an object store has them from the next save on. On rank 0."""
        if self.uploads is None:
            self.lease.check()
        self.metrics.append(content)

    def put(self, name: str, content: bytes) -> None:
        """Writes a small file beside the checkpoints, on an object store while training continues."""
        if self.uploads is not None:
            self.uploads.put(name, content)
        else:
            write_bytes(content, Path(self.uri, name))

    def _put_metrics(self) -> None:
        """Writes the metrics so far, before the checkpoint that is saved at their end."""
        self.flush_metrics()
        if self.uploads is not None and self.metrics is not None and self.metrics.appended > self._uploaded:
            self._uploaded = self.metrics.appended
            self.uploads.put(metrics.NAME, self.metrics.content)

    def _put_report(self) -> None:
        """Writes the page, if the config asks for it and anything is new; to an object store behind the checkpoint."""
        if self.config.report and self.metrics is not None and self.metrics.appended > self._reported:
            self._reported = self.metrics.appended
            if self.uploads is not None:
                self.uploads.do(partial(self._write_report, self.uploads.folder))
            else:
                self._write_report(self.folder)

    def _write_report(self, folder: RunFolder) -> None:
        try:
            folder.write(REPORT, report_page([folder]))
        except Exception as error:  # nobody loses a run for its page
            print(f"warning: {self.uri}/{REPORT}: {one_line(error)}", file=sys.stderr, flush=True)

    def attach(self, trainer: Trainer) -> None:
        """Supervises the trainer, which has loaded the checkpoint."""
        shutil.rmtree(self.staging / "resume", ignore_errors=True)
        if self._outdated:  # on rank 0; not before the new run has all that it needs
            self.folder.delete(self._outdated)
            self.metrics = metrics.MetricsFile(self.folder)
        saver = trainer._checkpoint_saver
        if saver is not None:
            saver._save_checkpoint = partial(self._save, saver, saver._save_checkpoint)
        trainer.state.callbacks.append(self.eviction)

    def _save(self, saver: CheckpointSaver, save: Callable[..., None], state: State, logger: Logger) -> None:
        """Lets Composer save a checkpoint; then uploads it, or prunes the folder."""
        self.before_save(state, logger)
        if self.uploads is None:  # Composer writes to the run's folder itself
            self.lease.check()
        self._put_metrics()
        before = len(saver.saved_checkpoints)
        save(state, logger)
        new = saver.saved_checkpoints[before:]  # none on a rank that doesn't write
        if self.uploads is not None:
            self.uploads.take(new)
        elif new and self.keep >= 0 and dist.get_global_rank() == 0:
            prune(self.folder, self.keep)
        self._put_report()

    def save_evicted(self, trainer: Trainer) -> bool:
        """Saves after `Evicted`, if it isn't yet; returns whether it is. The model must hold the training weights."""
        saver, now = trainer._checkpoint_saver, trainer.state.timestamp
        if saver is not None:
            saved = [(time.epoch, time.batch) for time in saver.all_saved_checkpoints_to_timestamp.values()]
            if (now.epoch, now.batch) not in saved:
                saver._save_checkpoint(trainer.state, trainer.logger)
        self.finish()
        return saver is not None

    def last(self) -> str | None:
        """The name of the newest complete checkpoint, on all ranks."""
        if self.folder is None:
            return None
        if self.uploads is not None:
            self.uploads.wait()
        return from_rank_0(lambda: newest(self.folder))

    def go_back(self, trainer: Trainer) -> str | None:
        """Loads weights, optimizer and averages of the newest checkpoint; returns its name, or None without one.

        Time, data, schedule and counters stay as they are.
        """
        name = self.last()
        if name is None:
            return None
        state = trainer.state
        rates = [group["lr"] for optimizer in state.optimizers for group in optimizer.param_groups]
        with warnings.catch_warnings(action="ignore"):  # of the callbacks that are left out
            checkpoint.load_checkpoint(str(self._local(name)), state, trainer.logger, ignore_keys=_keep_trained)
        groups = [group for optimizer in state.optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        shutil.rmtree(self.staging / "resume", ignore_errors=True)
        return name

    def finish(self) -> None:
        """Waits until all checkpoints are uploaded, on all ranks."""
        self._put_metrics()
        self._put_report()
        if self.uploads is not None:
            self.uploads.wait()
        if dist.get_world_size() > 1:
            dist.barrier()

    def close(self) -> None:
        """Releases the folder."""
        self.eviction.end()
        if self.uploads is not None and not self.uploads.end():
            return  # it continues until the process ends, so its files stay, and the lease, which then beats no more
        if self.uploads is not None and dist.get_local_rank() == 0:
            shutil.rmtree(self.staging, ignore_errors=True)
        if self.lease is not None and dist.get_global_rank() == 0:
            self.lease.release()


def _keep_trained(content: dict[str, Any]) -> None:
    """Leaves only what training changes in the content of a checkpoint."""
    state = content["state"]
    averages = {name: value for name, value in state["callbacks"].items() if name == "EMAWeights"}
    content.clear()
    content["state"] = {name: state[name] for name in ("model", "optimizers")} | {"callbacks": averages}


def from_rank_0(find: Callable[[], Any]) -> Any:
    """Calls ``find`` on rank 0; returns its result, or raises its error, on every rank."""
    found: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            found[0] = find()
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]
