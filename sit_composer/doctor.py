"""Checks a machine, and what a run needs of it:   python -m sit_composer.doctor [YAML] [key=value ...]

A line per check: ok, warning, failed (and what to do), or not checked (and why). Without a YAML, only the machine.
Between ranks, with what each one has: composer -n N -m sit_composer.doctor [YAML], on every node as for a training.
Nothing is left behind, and no credential is printed. The exit code is 1 if a check has failed. Whether a run itself
could start, with its data and its earlier checkpoints, says sit_composer/train.py --dry-run.
"""

import faulthandler
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module
from importlib.metadata import distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

from sit_composer.cli import hide, load, make_parser, run_command
from sit_composer.config.checks import check
from sit_composer.config.data_fits import local_spec
from sit_composer.config.load import load_config
from sit_composer.config.schema import Config, DataConfig
from sit_composer.data.needs import SHARED, open_files, shared_memory
from sit_composer.errors import UserError, one_line

Finding = tuple[str, ...]  # "ok", "warning", "failed" or "not checked"; what was found; and perhaps what to do
INSTALL = "run make install, or pip install -e ., in the repository's folder"
WORKERS = 8  # without a config: the default of data.num_workers
DOWNSAMPLE = 8  # Stable Diffusion's autoencoder, assumed where the shards are elsewhere
STOPPING = 5  # seconds after Ctrl-C for a check to remove what it made
LOCKED = 10  # seconds over a check's limit after which the whole process is ended
GIB = 2**30


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a check failed, or 2 for a mistake in the command or the YAML."""
    parser = make_parser("python -m sit_composer.doctor", __doc__)
    parser.add_argument("yaml", nargs="?", help="a run's config")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="override the YAML's keys")
    args = parser.parse_intermixed_args(argv)

    def work() -> int:
        config = load_config(args.yaml, args.overrides) if args.yaml is not None else None
        if config is not None:
            check(config)
        return examine(config)

    return run_command(work)


def examine(config: Config | None) -> int:
    """Makes all checks on each rank; the first one of each node prints their lines. Returns the exit code."""
    findings: dict[str, Finding] = {}
    first = os.environ.get("LOCAL_RANK", "0") == "0"

    def say(text: str) -> None:
        if first:
            print(hide(text), flush=True)

    def make(name: str, check: Callable[[], Finding], advice: str, seconds: float = 60) -> str:
        findings[name] = status, *texts = bounded(check, advice, seconds)
        say(f"  {name:<24} {status}: {'; '.join(texts)}")
        return status

    say(f"{socket.gethostname()}, {platform.platform()}, {len(os.sched_getaffinity(0))} processors")
    if first:
        own = distribution("sit-composer")
        make("packages", lambda: packages([f"Python{own.metadata['Requires-Python']}", *own.requires]), INSTALL)
        make("launcher", lambda: launcher(Path(sys.executable).with_name("composer")), INSTALL)
        make("open files", lambda: files(config), "raise the limit: ulimit -n 65536")
        make("shared memory", lambda: shared(SHARED, shared_need(config)), f"make {SHARED} writable, and larger")
    if make("torch", load_torch, INSTALL, 120) == "ok":
        import_module("sit_composer.probes").check_all(make, findings, config)
    counts = Counter(status for status, *_ in findings.values())
    say(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if counts["failed"] else 0


def bounded(check: Callable[[], Finding], advice: str, seconds: float) -> Finding:
    """What a check finds. It has failed if it raises an error, or gives no answer in time; then its thread is left.

    If a library holds Python's lock meanwhile, the process is ended (exit code 1), and shows where it was.
    """
    found: list[Finding] = []
    done = threading.Event()  # and not Thread.join, which in Python 3.11 takes a thread for ended after a Ctrl-C

    def work() -> None:
        try:
            found.append(check())
        except Exception as error:  # of any kind: the remaining checks must still be made
            prefix = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            found.append(("failed", f"{prefix}{one_line(error)}", advice))
        finally:
            done.set()

    faulthandler.dump_traceback_later(seconds + LOCKED, exit=True, file=sys.__stderr__)
    try:
        threading.Thread(target=work, daemon=True).start()
        done.wait(seconds)
    except KeyboardInterrupt:
        done.wait(STOPPING)
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
    return found[0] if found else ("failed", f"no answer within {seconds:g} s", advice)


def packages(requirements: Iterable[str]) -> Finding:
    """Compares what is installed, Python too, with requirements such as torch==2.7.0."""
    wrong, python = {}, platform.python_version()
    for needed in map(Requirement, requirements):
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            installed = (package.version for package in distributions(name=needed.name))
            found = python if needed.name == "Python" else next(installed, None)
            if found is None or not needed.specifier.contains(found, prereleases=True):
                wrong[needed.name] = f"{needed.name}: got {found or 'none'}, expected {needed.specifier}"
    if wrong:  # docs/development.md allows another torch
        return "warning" if wrong.keys() <= {"torch", "torchvision"} else "failed", "; ".join(wrong.values()), INSTALL
    return "ok", f"Python {python} in {sys.prefix}, and all packages that it needs"


def launcher(script: Path) -> Finding:
    """Whether the command composer is this project's: mosaicml installs one of that name, too."""
    if "sit_composer.launch" in (script.read_text(errors="replace") if script.is_file() else ""):
        return "ok", str(script)
    advice = "run pip install --no-deps --force-reinstall -e . in the repository's folder"
    return "warning", f"{script} is missing or mosaicml's, which kills ranks that still save", advice


def sections(config: Config | None) -> dict[str, DataConfig]:
    """The sections of a config that name shards."""
    found = {name: getattr(config, name, None) for name in ("data", "eval_data")}
    return {name: data for name, data in found.items() if data is not None}


def files(config: Config | None) -> Finding:
    """Whether a rank, or one of its loader's processes, may open enough files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = open_files(sum(data.num_workers for data in sections(config).values()) if config else WORKERS)
    if 0 <= soft < need:
        advice = f"raise the limit: ulimit -n {hard}" if hard >= need else "have the hard limit raised (limits.conf)"
        return "failed", f"a process may open {soft}, expected at least {need}", advice
    return "ok", f"a process may open {'any number' if soft < 0 else soft}, and needs {need}"


def shared_need(config: Config | None) -> int:
    """Bytes of shared memory of this node's loaders. Shards that are elsewhere are counted as images, the larger."""
    total, world = 0, int(os.environ.get("WORLD_SIZE", 1))
    for section, data in sections(config).items():
        spec, encoded = None, config.autoencoder.name is not None
        with suppress(UserError):  # --dry-run says what is wrong with shards
            spec = local_spec(data, section)
        side = data.image_size or config.model.input_size * (DOWNSAMPLE if encoded else 1)
        sample = (3 if encoded else config.model.in_channels) * side**2
        if spec is not None and spec.kind == "latents":  # float16 moments, and perhaps features
            sample = 2 * spec.stored * config.model.input_size**2
            if config.alignment is not None and config.alignment.name == "repa":
                sample += 2 * spec.features["grid"] ** 2 * spec.features["width"]
        total += shared_memory(data.num_workers, -(-data.global_batch_size // world), sample)
    return total * int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def shared(path: str, need: int) -> Finding:
    """Whether the file system of shared memory can be written to, and holds what loaders need."""
    with tempfile.TemporaryFile(dir=path) as file:
        file.write(bytes(2**20))
        file.flush()
    free = shutil.disk_usage(path).free
    text = f"{free / GIB:.3g} GiB free in {path}{f', and the loader needs {need / GIB:.3g}' if need else ''}"
    if free >= (2 * need or GIB):
        return "ok", text
    advice = "in a container: --shm-size=16g, or as yamls/clusters/kubernetes.yaml does; or lower data.num_workers"
    return "failed" if free < need else "warning", text, advice


def load_torch() -> Finding:
    load("torch")
    import_module("sit_composer.probes")
    return "ok", import_module("torch").__version__


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    if code and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(2)  # the launcher ends the node's other ranks at once: let the first one print what it was told
    os._exit(code)  # at once: a check that gave no answer may still wait in its thread
