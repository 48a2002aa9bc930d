"""Checks of this machine that need no torch: Python, packages, launcher, open files, shared memory and disks."""

import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from sit_composer.checkup.finding import Finding, Make, failed, not_checked, ok, warning
from sit_composer.config.schema import Config, DataConfig
from sit_composer.data.needs import open_files, shared_memory
from sit_composer.data.spec import DataSpec

OWN = "sit-composer"
SHARED = "/dev/shm"
INSTALL = "run make install, or pip install -e ., in the repository's folder"
OVERRIDDEN = ("torch", "torchvision")  # which docs/development.md allows to be newer
WORKERS = 8  # without a config: the default of data.num_workers
DOWNSAMPLE = 8  # Stable Diffusion's autoencoder, assumed where the shards are elsewhere
WRITTEN, CHUNK, WRITING = 2**26, 2**22, 5.0  # bytes that a disk's check writes, at a time, and seconds that it may take
GIB = 2**30


def check_machine(make: Make, config: Config | None, specs: dict[str, DataSpec]) -> None:
    """Makes all checks of this file but those of folders whose need is known later; ``specs`` are of local shards."""
    make("Python", 5, python, INSTALL)
    make("packages", 10, lambda: packages(distribution(OWN).requires or ()), INSTALL)
    make("launcher", 5, lambda: launcher(Path(sys.executable).with_name("composer")), INSTALL)
    sections = [getattr(config, name) for name in ("data", "eval_data")] if config is not None else []
    workers = sum(data.num_workers for data in sections if data is not None) if config is not None else WORKERS
    make("open files", 5, lambda: files(workers), "raise the limit: ulimit -n 65536")
    need = shared_need(config, specs) if config is not None else None
    make("shared memory", 10, lambda: shared(SHARED, need), f"make {SHARED} writable, and larger")


def python() -> Finding:
    """Whether this Python is one of those that the project admits."""
    expected = SpecifierSet(distribution(OWN).metadata["Requires-Python"])
    found = ".".join(map(str, sys.version_info[:3]))
    if found not in expected:
        return failed(f"got {found}, expected {expected}", f"with that Python, {INSTALL}")
    return ok(f"{found} in {sys.prefix}")


def packages(requirements: Iterable[str], path: list[str] | None = None) -> Finding:
    """Compares versions in the folders of ``path`` (``sys.path``) with requirements such as torch==2.7.0."""
    missing: list[str] = []
    other: list[str] = []
    newer: list[str] = []
    needed = [r for r in map(Requirement, requirements) if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in needed:
        name, expected = requirement.name, requirement.specifier
        found = next(iter(distributions(name=name, path=sys.path if path is None else path)), None)
        if found is None:
            missing.append(name)
        elif not expected.contains(found.version, prereleases=True):
            (newer if name in OVERRIDDEN else other).append(f"{name}: got {found.version}, expected {expected}")
    if missing or other:
        absent = [f"not installed: {', '.join(missing)}"] if missing else []
        return failed("; ".join([*absent, *other, *newer]), INSTALL)
    if newer:
        return warning("; ".join(newer), "docs/development.md says what was tested with others")
    return ok(f"the versions of all {len(needed)} packages fit")


def launcher(script: Path) -> Finding:
    """Whether the command composer is this project's: mosaicml installs one of that name, too."""
    if not script.is_file():
        return warning(f"no command {script}", "python sit_composer/launch.py does the same")
    if "sit_composer.launch" not in script.read_text(errors="replace"):
        advice = "run pip install --no-deps --force-reinstall -e . in the repository's folder"
        return warning(f"{script} is mosaicml's, which kills ranks that still save", advice)
    return ok(str(script))


def files(workers: int) -> Finding:
    """Whether a rank, or one of its loader's processes, may open enough files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = open_files(workers)
    if 0 <= soft < need:
        advice = f"raise the limit: ulimit -n {hard}" if hard >= need else "have the hard limit raised (limits.conf)"
        return failed(f"a process may open {soft}, expected at least {need}", advice)
    return ok(f"a process may open {'any number' if soft < 0 else soft}, and needs {need}")


def shared_need(config: Config, specs: dict[str, DataSpec]) -> int:
    """Bytes of shared memory of this node's loaders. Shards that are elsewhere are counted as images, the larger."""
    total, world = 0, int(os.environ.get("WORLD_SIZE", 1))
    for section in ("data", "eval_data"):
        data = getattr(config, section)
        if data is not None:
            sample = sample_bytes(config, data, specs.get(section))
            total += shared_memory(data.num_workers, -(-data.global_batch_size // world), sample)
    return total * int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def sample_bytes(config: Config, data: DataConfig, spec: DataSpec | None) -> int:
    """Bytes of a sample in a batch: an image of uint8, or float16 moments and perhaps features."""
    model, features = config.model, 0
    if spec is not None and spec.kind == "latents":
        if config.alignment is not None and config.alignment.name == "repa":
            features = spec.features["grid"] ** 2 * spec.features["width"]
        return 2 * (spec.stored * model.input_size**2 + features)
    encoded = config.autoencoder.name is not None
    side = data.image_size or model.input_size * (DOWNSAMPLE if encoded else 1)
    return (3 if encoded else model.in_channels) * side**2


def shared(path: str, need: int | None) -> Finding:
    """Whether the file system of shared memory holds what loaders need."""
    if not os.path.isdir(path):
        return not_checked(f"there is no {path}")
    with tempfile.TemporaryFile(dir=path) as file:
        file.write(bytes(2**20))
        file.flush()
    free = shutil.disk_usage(path).free
    text = f"{free / GIB:.3g} GiB free in {path}"
    advice = "in a container: --shm-size=16g, or as yamls/clusters/kubernetes.yaml does; or lower data.num_workers"
    if need is not None and free < need:
        return failed(f"{text}, and the loader needs {need / GIB:.3g}", advice)
    if free < (2 * need if need is not None else GIB):
        return warning(text, advice)
    return ok(text if need is None else f"{text}, and the loader needs {need / GIB:.3g}")


def disk(path: str, checkpoint: int = 0, grace: float = 0) -> Finding:
    """Free space where a folder is or will be, and a real write. It leaves nothing, also if it is killed.

    ``checkpoint``: bytes of a checkpoint that is saved there, within ``grace`` seconds of a SIGTERM.
    """
    above = next(p for p in (Path(path).absolute(), *Path(path).absolute().parents) if p.exists())
    if not above.is_dir():
        return failed(f"{above} is a file, expected a folder", "delete it, or choose another folder")
    free = shutil.disk_usage(above).free
    size, written, chunk = min(WRITTEN, free // 4), 0, os.urandom(CHUNK)
    started = time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=above, buffering=0) as file:
            while written == 0 or (written < size and time.perf_counter() - started < WRITING):
                written += file.write(chunk)
                os.fsync(file.fileno())
    except OSError as error:
        return failed(f"{above}: {error.strerror}", "free some space or make it writable, or choose another folder")
    speed = written / (time.perf_counter() - started)
    text = f"{free / GIB:.3g} GiB free in {above}, {speed / 1e6:.3g} MB/s written and synced"
    if not checkpoint:
        more = "free some space, or choose another folder"
        return ok(text) if free >= GIB else warning(text, more)
    text += f"; a checkpoint has {checkpoint / 1e9:.3g} GB"
    if free < 2 * checkpoint:  # the new one is written before an old one is deleted
        verdict = failed if free < checkpoint else warning
        return verdict(text, "free space for two, or choose another folder")
    if checkpoint / speed > grace:
        advice = f"raise supervision.grace, {grace:g} s, and what the scheduler allows, or take a faster disk"
        return warning(f"{text}, which takes {checkpoint / speed:.0f} s", advice)
    return ok(text)
