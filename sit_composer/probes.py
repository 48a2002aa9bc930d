"""The doctor's checks of what takes seconds to load or to answer: GPU, ranks, disks, object stores and the Hub."""

import os
import shutil
import socket
import statistics
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable
from datetime import timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from urllib.error import HTTPError

import boto3
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from torch import Tensor, distributed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.collect_env import get_nvidia_driver_version
from torch.utils.collect_env import run as run_shell

from sit_composer.attention import attend
from sit_composer.cli import is_hub_name, is_remote, s3_endpoint
from sit_composer.config.ranks import save_folder
from sit_composer.config.schema import Config
from sit_composer.costs.estimate import checkpoint_bytes
from sit_composer.doctor import GIB, Finding, sections
from sit_composer.errors import first_line, one_line
from sit_composer.precision import autocast, has_bfloat16, resolve
from sit_composer.storage import StorageError, open_run_folder

Make = Callable[..., str]
DRIVER = Path("/proc/driver/nvidia/version")
GPU = "nvidia-smi must list the GPU; in a container: --gpus all, and a driver on the host"
FAULT = "update the driver, or take another device: one of them is at fault"
HEADS, WIDTH, TOKENS = 16, 72, 256  # of SiT-XL/2
MEETING = 120.0  # seconds for all ranks to meet and to measure
NETWORK = (
    "node 0's MASTER_ADDR and MASTER_PORT must be reachable; NCCL_DEBUG=INFO says what fails, and NCCL_SOCKET_IFNAME "
    "(GLOO_SOCKET_IFNAME on CPUs) names the network"
)
SLOW = 1e9  # bytes a second between GPUs, below which the network is none for training: 10 Gbit Ethernet's
SPACE = "free some space or make it writable, or choose another folder"
WRITTEN = 2**26  # bytes that a disk's check writes
PROBE = ".sit_composer-doctor-"
SKEW, REFUSED_SKEW = 60, 840  # seconds: nodes' logs can't be compared; S3 refuses requests that are off by 900
CLOCK = "set the clock by NTP (timedatectl set-ntp true)"
ENDPOINT = "S3_ENDPOINT_URL must name the store, and no firewall or proxy may be between"
UNREACHED = "the store is not reached, or refuses this clock"
SAVE = "it needs a bucket, and credentials that may list, write, read and delete (s3:ListBucket, PutObject, …) there"


def check_all(make: Make, findings: dict[str, Finding], config: Config | None) -> None:
    """Makes the checks of this rank's device, of what a node writes to and reaches, and of what ranks send."""
    make("GPU", gpu, GPU)
    make("bfloat16", lambda: bfloat16(config.precision if config is not None else "auto"), GPU)
    make("flash attention", flash_attention, GPU)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        make("disk TMPDIR", lambda: disk(tempfile.gettempdir()), SPACE)
        if config is not None:
            check_run(make, config)
        else:
            make("save folder, store, Hub", lambda: ("not checked", "give the run's YAML, which names them"), "")
    own = [f"{name}: {'; '.join(texts)}" for name, (status, *texts) in findings.items() if status == "failed"]
    make("ranks", lambda: ranks(own), NETWORK, MEETING + 30)


def check_run(make: Make, config: Config) -> None:
    """Makes the checks of the folders, the store and the Hub's repositories that a config names."""
    remote = {name: data for name, data in sections(config).items() if data.remote}
    for name, data in remote.items():
        make(f"disk {name}.local", partial(disk, data.local), SPACE)
    saved = save_folder(config) if config.trainer.get("save_folder") else ""
    if saved:
        made = tempfile.gettempdir() if is_remote(saved) else saved  # where a checkpoint is made
        make("disk of checkpoints", lambda: disk(made, checkpoint_bytes(config), config.supervision.grace), SPACE)
    uses_s3 = any(uri.startswith("s3://") for uri in (saved, *(data.remote for data in remote.values())))
    reached = not uses_s3 or make("S3 clock", clock, ENDPOINT) != "failed"
    if is_remote(saved):
        tried = reached or not saved.startswith("s3://")
        make("trainer.save_folder", lambda: written(saved) if tried else ("not checked", UNREACHED), SAVE)
    for name, repository in hub_names(config).items():
        make(name, partial(hub, repository), "set HF_TOKEN, and HF_HOME")


def device() -> str:
    """cuda or cpu. Makes this rank's GPU the thread's: each check has a thread of its own."""
    if not torch.cuda.is_available():
        return "cpu"
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return "cuda"


def gpu() -> Finding:
    """This rank's GPU, the driver, and what other programs have taken."""
    if not torch.cuda.is_available():
        if DRIVER.exists() or shutil.which("nvidia-smi"):
            torch.cuda.init()  # raises why it can't be used
        return "not checked", "torch finds no GPU; what follows is checked on the CPU"
    count, rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if rank >= count:
        return "failed", f"{count} GPUs for rank {rank} of this node, expected one per rank", "lower -n"
    device()
    free, total = torch.cuda.mem_get_info()
    text = f"{torch.cuda.get_device_name()}, {free / GIB:.3g} of {total / GIB:.3g} GiB free; {count} on this node; "
    text += f"driver {get_nvidia_driver_version(run_shell)}; torch for CUDA {torch.version.cuda}"
    return ("ok", text) if free > 0.9 * total else ("warning", text, "another program uses it: nvidia-smi names it")


def bfloat16(precision: str) -> Finding:
    """Multiplies matrices in bfloat16, and resolves a run's precision."""
    here = device()
    resolved = resolve(precision, here)
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0)).to(here)
    with autocast("bf16", here):
        product = a @ b
    if fault := far(product, a.double() @ b.double(), 0.01):
        return "failed", f"a product of matrices is wrong: {fault}", FAULT
    kind = "in hardware" if has_bfloat16(here) else "slowly, as there is no hardware for it"
    return "ok", f"computed {kind}; precision={precision}{f' is {resolved} here' if resolved != precision else ''}"


def flash_attention() -> Finding:
    """Calls the kernel forward and backward, and compares it with attention by matrix products."""
    here = device()
    dtype = torch.bfloat16 if here == "cuda" else torch.float32
    drawn = torch.randn(3, 2, HEADS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).to(here, dtype)
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            found = with_gradients(drawn)
    except RuntimeError as error:  # torch's, also for a GPU without the kernel
        advice = "torch takes a slower kernel here; a GPU since Ampere has it, with bf16 or amp_fp16"
        return "warning", f"does not run: {first_line(error)}", advice
    with sdpa_kernel(SDPBackend.MATH):
        expected = with_gradients(drawn.float())
    if fault := far(found, expected, 0.02):
        return "failed", f"is wrong: {fault}", FAULT
    return "ok", f"ran in {str(dtype).removeprefix('torch.')} with {HEADS} heads of {WIDTH} and {TOKENS} tokens"


def with_gradients(qkv: Tensor) -> Tensor:
    """Attention of (3, N, heads, T, d), and the gradient of its sum of squares, as one float32 vector."""
    qkv = qkv.detach().requires_grad_()
    out = attend(*qkv)
    out.float().square().sum().backward()
    return torch.cat([out.flatten().float(), qkv.grad.flatten().float()]).detach()


def far(found: Tensor, expected: Tensor, most: float) -> str | None:
    """The relative error, if it is over ``most`` or no number."""
    error = ((found.double() - expected).norm() / expected.norm()).item()
    return None if error <= most else f"relative error {error:.2g}, expected at most {most:g}"


def ranks(own: list[str]) -> Finding:
    """Sums numbers over all ranks, measures that, and tells what failed elsewhere, whose console may not be seen."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world == 1:
        return "not checked", "there is one rank; run composer -n N -m sit_composer.doctor"
    here = device()
    backend = "nccl" if here == "cuda" else "gloo"
    # Never destroyed: Gloo's destructor can wait forever for a thread that waits for Python's lock. The command exits.
    distributed.init_process_group(backend, timeout=timedelta(seconds=MEETING))
    values, took, wrong = torch.empty((64 if here == "cuda" else 4) * 2**20, device=here), [], ""
    for _ in range(6):  # all of them, whatever one finds: the others are in the same collectives
        values.fill_(rank + 1)
        started = time.perf_counter()
        distributed.all_reduce(values)
        least, most = values.aminmax()
        found, expected = {least.item(), most.item()}, world * (world + 1) / 2  # waits for it
        took.append(time.perf_counter() - started)
        if found != {expected}:
            wrong = f"{backend} summed {found}, expected {expected:g}"
    everywhere: list[tuple[str, list[str]]] = [("", [])] * world
    distributed.all_gather_object(everywhere, (socket.gethostname(), [*own, wrong] if wrong else own))
    if wrong:
        return "failed", wrong, NETWORK
    told = [f"rank {i}, {host}: {text}" for i, (host, texts) in enumerate(everywhere) if i != rank for text in texts]
    if told:
        return "failed", *told
    speed = 2 * (world - 1) / world * values.nbytes / statistics.median(took[1:])  # nccl-tests' "bus bandwidth"
    text = f"{backend} between {world} ranks on {', '.join(sorted({host for host, _ in everywhere}))}: "
    text += f"{speed / 1e9:.3g} GB/s for {values.nbytes / 1e6:.0f} MB"
    if here == "cuda" and speed < SLOW:
        return "warning", text, "NCCL_DEBUG=INFO says which network it takes; NCCL_SOCKET_IFNAME names another"
    return "ok", text


def disk(path: str, checkpoint: int = 0, grace: float = 0) -> Finding:
    """Free space where a folder is or will be, and a real write. It leaves nothing, also if it is killed.

    ``checkpoint``: bytes of a checkpoint that is saved there, within ``grace`` seconds of a SIGTERM.
    """
    above = next(p for p in (Path(path).absolute(), *Path(path).absolute().parents) if p.exists())
    if not above.is_dir():
        return "failed", f"{above} is a file, expected a folder", "delete it, or choose another folder"
    free = shutil.disk_usage(above).free
    content = os.urandom(max(1, min(WRITTEN, free // 4)))
    started = time.perf_counter()
    with tempfile.TemporaryFile(dir=above, buffering=0) as file:
        file.write(content)
        os.fsync(file.fileno())
    speed = len(content) / (time.perf_counter() - started)
    text = f"{free / GIB:.3g} GiB free in {above}, {speed / 1e6:,.0f} MB/s written and synced"
    text += f"; a checkpoint has {checkpoint / 1e9:.3g} GB" if checkpoint else ""
    if free < (2 * checkpoint or GIB):  # the new one is written before an old one is deleted
        return "failed" if free < checkpoint else "warning", text, "free some space, or choose another folder"
    if checkpoint and checkpoint / speed > grace:
        advice = f"raise supervision.grace, {grace:g} s, and what the scheduler allows, or take a faster disk"
        return "warning", f"{text}, which takes {checkpoint / speed:.0f} s", advice
    return "ok", text


def clock() -> Finding:
    """This machine's clock against the Date header of the S3 store, which any answer has."""
    url, before = s3_endpoint() or boto3.Session().client("s3").meta.endpoint_url, time.time()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10) as answer:
            headers = answer.headers
    except HTTPError as error:  # as without credentials
        headers = error.headers
    except OSError as error:
        return "failed", f"{url}: {one_line(getattr(error, 'reason', error))}", ENDPOINT
    if "Date" not in headers:
        return "not checked", f"{url} answers without a Date"
    ahead = (before + time.time()) / 2 - parsedate_to_datetime(headers["Date"]).timestamp()
    text = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} {url}"
    if abs(ahead) > REFUSED_SKEW:
        return "failed", f"{text}, which refuses requests at 900 s", CLOCK
    return ("warning", text, CLOCK) if abs(ahead) > SKEW else ("ok", text)


def written(uri: str) -> Finding:
    """Writes, reads, lists and deletes objects in a folder of its own below ``uri``."""
    folder = open_run_folder(f"{uri.rstrip('/')}/{PROBE}{uuid.uuid4().hex}")
    step, names, started = "list", ["object", "lease"], time.perf_counter()
    try:
        folder.listing()  # first: in some stores, a write to a missing bucket creates it
        step = "write"
        folder.write("object", b"1")
        try:
            made = [folder.replace("lease", *change) for change in ((None, b"1"), (None, b"2"), (b"1", b"3"))]
            step = "read"
            content = folder.read("object")
            step = "list"
            listing = folder.listing()
        finally:
            stopped_at, step = step, "delete"
            folder.delete(names)
            step = stopped_at
        left = folder.listing()
    except StorageError as error:
        kept = f"; {folder.uri} stays there" if step == "delete" else ""
        return "failed", f"{step}: {error}{kept}", SAVE
    if content != b"1" or listing != dict.fromkeys(names, 1) or left:
        text = f"read {content!r}, listed {listing}, and {left} after deleting"
        return "failed", text, "take another store: this one isn't consistent"
    if made != [True, False, True]:
        why = "has no conditional writes: of two runs that start together, both may write for some seconds"
        return "warning", f"{uri}: the store {why}", "start one at a time, or take a store that has them"
    took = time.perf_counter() - started
    return "ok", f"wrote (conditionally, too), read, listed and deleted in {uri} in {took:.2g} s"


def hub_names(config: Config) -> dict[str, str]:
    """The Hub's repositories that a run loads from, by key."""
    library, _, model = (getattr(config.alignment, "teacher", None) or "").partition(":")
    teacher = f"timm/{model}" if library == "timm" and "/" not in model and not os.path.isdir(model) else model
    names = {"autoencoder.name": config.autoencoder.name, "alignment.teacher": teacher, "init_from": config.init_from}
    names = {key: (name or "").removeprefix("hf://") for key, name in names.items()}
    return {key: name for key, name in names.items() if is_hub_name(name)}


def hub(name: str) -> Finding:
    """Whether a repository of the Hub may be read, or is in the cache."""
    cached = any(isinstance(try_to_load_from_cache(name, f), str) for f in ("config.json", "vae/config.json"))
    try:
        HfApi().auth_check(name)
    except Exception as error:  # huggingface_hub's and its HTTP library's
        text = f"{name}: {type(error).__name__}: {one_line(error)}"
        advice = "accept its licence and set HF_TOKEN, or copy it here and give the folder"
        return ("ok", f"{name} is in the cache; the Hub can't be asked") if cached else ("failed", text, advice)
    return "ok", f"{name} may be read{' and is in the cache' if cached else ''}"
