"""The launch recipes: their content, and real runs of run.sh, with signals and on two nodes."""

import getpass
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from packaging.specifiers import SpecifierSet

from sit_composer.checkpoint.load import load_checkpoint
from tests.helpers.paths import ROOT
from tests.helpers.s3 import free_ports

CLUSTERS = ROOT / "yamls" / "clusters"
TINY = ["model.hidden_size=32", "model.depth=1", "model.num_heads=2", "scheduler={constant: {}}"]
RECIPES = ["kubernetes.yaml", "mcli.yaml", "skypilot.yaml", "slurm.sbatch"]
SECRETS = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY"]
VARIABLES = ["NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE"]
TRAIN = """
import os, signal, sys, time
mode, folder = sys.argv[2].split("=")[1], sys.argv[3].split("=")[1]
rank, told = int(os.environ["RANK"]), 0

def hear(*_):
    global told
    told += 1

signal.signal(signal.SIGTERM, hear)
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
with open(f"{folder}/{rank}.tmp", "w") as file:
    file.write(" ".join(os.environ[name] for name in names))
os.rename(f"{folder}/{rank}.tmp", f"{folder}/{rank}")
while mode == "wait" and not told:
    time.sleep(0.01)
if mode == "wait":
    time.sleep(35 if rank else 0.1)  # an upload that takes longer than the launcher's 30 s
    with open(f"{folder}/{rank}.told", "w") as file:
        file.write(str(told))
    sys.exit(143)
if rank == 1 and mode == "fail":
    sys.exit(7)
if rank == 1 and mode == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
while mode != "end" and not told:
    time.sleep(0.01)
sys.exit(143 if told else 0)
"""


def environment(**variables: object) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in (*VARIABLES, "WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE")}
    clean["PATH"] = f"{Path(sys.executable).parent}:{clean['PATH']}"
    return clean | {name: str(value) for name, value in variables.items()}


@pytest.fixture
def started():
    """Starts commands in sessions of their own, and kills these at the end."""
    processes = []

    def start(command: list[str], **options: object) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, start_new_session=True, **(pipes | options)))
        return processes[-1]

    yield start
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.wait()


def recipes(folder: Path, training: str) -> None:
    """Copies the recipes to a folder where they start this training."""
    shutil.copytree(CLUSTERS, folder / "yamls" / "clusters", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "sit_composer").mkdir()
    shutil.copy(ROOT / "sit_composer" / "launch.py", folder / "sit_composer")
    (folder / "sit_composer" / "train.py").write_text(training)


@pytest.fixture
def stand_in(tmp_path, started):
    """Starts run.sh with a stand-in for the training, controlled by mode=."""
    recipes(tmp_path, TRAIN)

    def start(mode: str, **variables: object) -> tuple[subprocess.Popen, Path]:
        folder = tmp_path / mode
        folder.mkdir()
        command = ["bash", str(tmp_path / "yamls/clusters/run.sh"), str(CLUSTERS / "mcli.yaml")]
        return started([*command, f"mode={mode}", f"folder={folder}"], env=environment(**variables)), folder

    return start


def until(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


# --- What the recipes say ---


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_on_every_node_what_run_sh_takes_and_says_how_to_submit_it(name):
    text = (CLUSTERS / name).read_text()
    header = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert re.search(r"^# +(sbatch|kubectl|sky jobs launch|mcli run|sed .*kubectl)", header, re.MULTILINE)
    for wanted in ("yamls/clusters/run.sh", "yamls/sit_xl_2.yaml", "data.remote=s3://", "data.local=", "NNODES"):
        assert wanted in text, wanted
    assert re.search(r"trainer.save_folder=s3://\S+/\{run_name\}", text)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_no_secret_in_it(name):
    text = (CLUSTERS / name).read_text()
    for secret in SECRETS:
        for value in re.findall(rf"{secret}\s*[=:]\s*(\S*)", text):
            assert value in ("null", "…"), f"{secret} is given {value}"
    assert "S3_ENDPOINT_URL" in text
    if name.endswith(".yaml"):
        list(yaml.safe_load_all(text))


def test_skypilot_is_given_its_secrets_at_the_launch():
    task = yaml.safe_load((CLUSTERS / "skypilot.yaml").read_text())
    assert task["secrets"] == dict.fromkeys(SECRETS)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [143]
    assert not set(task["envs"]) & {*SECRETS, "S3_ENDPOINT_URL"}


def test_kubernetes_makes_an_evicted_pod_anew_and_gives_up_on_a_mistake():
    service, job = yaml.safe_load_all((CLUSTERS / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    rules = [
        (rule["action"], rule["onExitCodes"]["values"])
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    ]
    assert rules == [("FailJob", [2]), ("Ignore", [143])]
    assert pod["restartPolicy"] == "Never"
    variables = {v["name"]: v.get("value") for v in pod["containers"][0]["env"]}
    assert int(variables["NNODES"]) == spec["completions"] == spec["parallelism"]
    assert variables["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert int(variables["NPROC_PER_NODE"]) == pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "sit-composer"}}]


def test_mcli_accepts_its_recipe():
    from mcli.models.run_config import FinalRunConfig, RunConfig

    recipe = RunConfig.from_file(CLUSTERS / "mcli.yaml")
    sent = FinalRunConfig.finalize_config(recipe).to_create_run_api_input()["runInput"]
    assert sent["scheduling"] == {"preemptible": True, "retryOnSystemFailure": True, "maxRetries": 10}
    assert sent["envVariables"] == []


@pytest.mark.parametrize(
    ("mode", "line"), [(None, "error: SECRETS: {}: no such file"), (0o640, "error: {}: others can read it; chmod 600")]
)
def test_slurm_refuses_secrets_that_others_can_read(tmp_path, mode, line):
    secrets = tmp_path / "secrets"
    if mode is not None:
        secrets.touch(mode)
        secrets.chmod(mode)
    command = ["bash", "yamls/clusters/slurm.sbatch", "yamls/quickstart.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=environment(SECRETS=secrets), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, line.format(secrets) + "\n")


# --- run.sh ---


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"NNODES": 2, "NODE_RANK": 0}, "MASTER_ADDR: not set, expected node 0's name or address (NNODES=2)"),
        ({"NNODES": 2, "MASTER_ADDR": "a"}, "NODE_RANK: not set, expected each node's own number, from 0 (NNODES=2)"),
        ({"NNODES": 2, "NODE_RANK": 2, "MASTER_ADDR": "a"}, "NODE_RANK: got 2, expected 0 to 1 (NNODES=2)"),
        ({"NNODES": "two"}, "NNODES: got two, expected a whole number"),
        ({"NNODES": 0}, "NNODES: got 0, expected at least 1"),
        ({"NODE_RANK": -1}, "NODE_RANK: got -1, expected a whole number"),
        ({"NPROC_PER_NODE": 0}, "NPROC_PER_NODE: got 0, expected at least 1"),
        ({"NPROC_PER_NODE": "08"}, "NPROC_PER_NODE: got 08, expected a whole number"),
    ],
)
def test_run_sh_refuses_what_makes_no_sense_in_one_line(variables, line):
    command = ["bash", "yamls/clusters/run.sh", "yamls/quickstart.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr, done.stdout) == (2, f"error: {line}\n", "")


@pytest.mark.parametrize("arguments", [[], ["nowhere.yaml"]])
def test_run_sh_wants_a_yaml(arguments):
    command = ["bash", "yamls/clusters/run.sh", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_run_sh_gives_the_ranks_their_numbers_and_the_first_failure_is_its_exit_code(stand_in):
    """Composer's own code is rank 0's, here 143, as it ends rank 0 when rank 1 has failed."""
    left_over = {"WORLD_SIZE": 16, "LOCAL_WORLD_SIZE": 8, "BASE_RANK": 3}
    fail, folder = stand_in("fail", NPROC_PER_NODE=2, **left_over)
    kill, _ = stand_in("kill", NPROC_PER_NODE=2, MASTER_PORT=31234)
    node, _ = stand_in("end", NPROC_PER_NODE=2, NNODES=3, NODE_RANK=2, MASTER_ADDR="head", MASTER_PORT=31234)
    codes = [process.wait(600) for process in (fail, kill, node)]
    assert codes == [7, 137, 0]
    *rank, address, port = (folder / "0").read_text().split()
    assert (rank, address) == (["0", "2", "0", "2", "0"], "127.0.0.1")
    assert int(port) > 1024
    assert (folder.parent / "kill" / "1").read_text() == "1 2 1 2 0 127.0.0.1 31234"
    assert (folder.parent / "end" / "4").read_text() == "4 6 0 2 2 head 31234"
    assert (folder.parent / "end" / "5").read_text() == "5 6 1 2 2 head 31234"


@pytest.mark.slow
def test_a_sigterm_reaches_each_rank_once_and_the_slow_one_is_waited_for(stand_in):
    process, folder = stand_in("wait", NPROC_PER_NODE=2)
    until(lambda: all((folder / str(rank)).exists() for rank in (0, 1)), 600, "two ranks")
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(1)
    os.kill(process.pid, signal.SIGTERM)  # again, as some schedulers do
    assert process.wait(600) == 143, process.stdout.read()
    assert [(folder / f"{rank}.told").read_text() for rank in (0, 1)] == ["1", "1"]
    assert not any(rank.is_running() for rank in ranks)


# --- The image ---


def instructions() -> list[tuple[str, str]]:
    """Those of the Dockerfile: (name, arguments)."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", "")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_the_image_has_what_it_copies_a_user_of_its_own_and_no_secret():
    found = instructions()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    sources = [word for name, words in found if name == "COPY" for word in words.split()[:-1]]
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(sources) == kept  # of a context that leaves out all else
    assert all((ROOT / source).exists() for source in sources)
    assert sources.index("pyproject.toml") < sources.index("sit_composer")  # a change of code keeps the packages' layer
    extras = re.search(r"'\.\[([\w,]+)\]'", " ".join(words for _, words in found))[1]
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    python = re.fullmatch(r"python:(3\.\d+\.\d+)-slim-\w+", dict(found)["FROM"])[1]
    assert python in SpecifierSet(project["requires-python"])
    assert dict(found)["ENTRYPOINT"] == '["composer"]'
    assert "composer" in project["scripts"]
    assert [words for name, words in found if name in ("ENV", "ARG") and re.search("KEY|TOKEN|SECRET", words)] == []


def test_kubernetes_runs_the_image_as_its_user():
    job = list(yaml.safe_load_all((CLUSTERS / "kubernetes.yaml").read_text()))[-1]
    user = int(dict(instructions())["USER"])
    security = job["spec"]["template"]["spec"]["securityContext"]
    assert security == {"runAsNonRoot": True, "runAsUser": user, "fsGroup": user}
    assert user != 0


@pytest.mark.parametrize("image", [None, "registry#sit"])
def test_slurm_starts_the_image_where_one_is_given(tmp_path, image):
    """With stand-ins for Slurm's commands: pyxis isn't here."""
    for name, text in (("srun", 'printf "%s\\n" "$@"'), ("scontrol", "echo node0")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": 1, "SLURM_JOB_NODELIST": "node0", "SLURM_JOB_ID": 7, "HOME": tmp_path}
    slurm |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | ({"IMAGE": image} if image else {})
    command = ["bash", str(CLUSTERS / "slurm.sbatch"), "a.yaml", "run_name=x y"]
    clean = {name: value for name, value in environment(**slurm).items() if name != "IMAGE" or image}
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=60)
    words = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert words[-2:] == ["a.yaml", "run_name=x y"]
    options = ["--container-image=registry#sit", "--container-workdir=/sit_composer", "--container-mounts=/tmp:/tmp"]
    assert [word for word in words if word.startswith("--container")] == (options if image else [])


# --- Two nodes ---


def sh(command: str) -> None:
    subprocess.run(command, shell=True, check=True, capture_output=True, timeout=30)


@pytest.fixture
def nodes():
    """Two simulated machines, each with its own network, /dev/shm and name: the prefixes for their commands."""
    names = [f"sit{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            sh(f"ip netns add {name} && ip -n {name} link set lo up")
        sh(f"ip link add veth0 netns {names[0]} type veth peer name veth0 netns {names[1]}")
        for i, name in enumerate(names):
            sh(f"ip -n {name} addr add 10.77.0.{i + 1}/24 dev veth0 && ip -n {name} link set veth0 up")
        alone = 'mount -t tmpfs tmpfs /dev/shm && hostname $0 && exec "$@"'
        prefixes = [["ip", "netns", "exec", name, "unshare", "-mu", "sh", "-c", alone, name] for name in names]
        for prefix in prefixes:
            sh(f"{shlex.join(prefix)} ip addr show veth0")
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"network namespaces can't be made here: {error}")
    else:
        yield prefixes
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.nightly
def test_two_nodes_train_what_one_node_with_two_ranks_does(nodes, started, digits_shards, tmp_path):
    def command(node: str, name: str) -> list[str]:
        data = tmp_path / f"shards-{name}-{node}"
        shutil.copytree(digits_shards, data)
        places = [f"data.local={data}", f"trainer.save_folder={tmp_path / name}", "trainer.progress_bar=false"]
        run = [f"run_name={name}", "trainer.max_duration=6ba", "trainer.save_interval=6ba"]
        return ["bash", f"{ROOT}/yamls/clusters/run.sh", "yamls/quickstart.yaml", *TINY, *places, *run]

    one = started(command("", "one"), cwd=ROOT, env=environment(NPROC_PER_NODE=2))
    assert one.wait(600) == 0, one.stdout.read()
    both = []
    for i, prefix in enumerate(nodes):
        place = tmp_path / f"node{i}"
        place.mkdir()
        # By default, gloo takes the address of the machine's name, which the namespaces don't have.
        variables = {"TMPDIR": place, "GLOO_SOCKET_IFNAME": "veth0"}
        variables |= {"NNODES": 2, "NODE_RANK": i, "MASTER_ADDR": "10.77.0.1", "NPROC_PER_NODE": 1}
        both.append(started([*prefix, *command(str(i), "two")], cwd=ROOT, env=environment(**variables)))
    for node in both:
        assert node.wait(600) == 0, node.stdout.read()
    for name in ("training", "ema"):
        expected, got = (load_checkpoint(str(tmp_path / run), name).weights for run in ("one", "two"))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


# --- Slurm ---

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(params=["linuxproc"])  # pgid works too, and takes as long again
def slurm(request, tmp_path_factory, started):
    """A cluster of one node, this machine: a function that runs one of its commands."""
    daemons = [shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("munged", "slurmctld", "slurmd")]
    if None in daemons:
        pytest.skip("Slurm isn't installed; on Debian: apt install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(mode=0o755)
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    (folder / "munge" / "key").chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    values = {"host": host, "ports": free_ports(2), "user": getpass.getuser(), "folder": folder}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(tracking=request.param, **values))
    files = {"key": "munge/key", "seed": "munge/seed", "log": "munge/log", "pid": "munge/pid"}
    munge = [f"--{name}-file={folder / file}" for name, file in files.items()]
    out = {"stdout": subprocess.DEVNULL, "env": environment(SLURM_CONF=folder / "slurm.conf")}
    started([daemons[0], "--foreground", "--force", f"--socket={folder}/munge.socket", *munge], **out)
    until(lambda: (folder / "munge.socket").exists(), 20, "munged")
    started([daemons[1], "-D"], **out)
    started([daemons[2], "-D"], **out)

    def run(*command: str, **variables: str) -> str:
        options = {"cwd": ROOT, "env": out["env"] | variables, "capture_output": True, "text": True, "timeout": 60}
        done = subprocess.run(command, **options)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def idle() -> bool:
        done = subprocess.run(["sinfo", "-h", "-o", "%t"], env=out["env"], capture_output=True, text=True, timeout=60)
        return done.stdout.strip() == "idle"

    until(idle, 60, "the cluster")
    yield run
    subprocess.run(["scancel", "--signal=KILL", "--full", "--me"], env=out["env"], capture_output=True)
    time.sleep(1)


@pytest.mark.nightly
def test_slurm_trains_requeues_what_a_sigterm_has_saved_and_lets_a_cancelled_job_be(slurm, digits_shards, tmp_path):
    """On a cluster of this machine, with the real training on the digits."""
    log, folder = tmp_path / "log", tmp_path / "run"
    secrets = tmp_path / "secrets"
    secrets.write_text("HF_TOKEN=not-a-token\n")
    secrets.chmod(0o600)

    def submit(batches: int) -> str:
        options = ["--nodes=1", "--gpus-per-node=0", f"--output={log}", "--parsable"]
        # The launcher fills in the variable, which the first start doesn't have.
        logger = f"loggers={{file: {{filename: '{tmp_path}/batches-$SLURM_RESTART_COUNT', flush_interval: 1}}}}"
        overrides = [*TINY, f"data.local={digits_shards}", f"trainer.save_folder={folder}", logger]
        overrides += [f"trainer.max_duration={batches}ba", "trainer.save_interval=1000000ba"]
        script = ["yamls/clusters/slurm.sbatch", "yamls/quickstart.yaml", *overrides]
        return slurm("sbatch", *options, *script, SECRETS=str(secrets), OMP_NUM_THREADS="1").strip()

    def state_is(job: str, wanted: str) -> None:
        def state() -> str:
            return re.search(r"JobState=(\S+)", slurm("scontrol", "show", "job", job))[1]

        until(lambda: state() == wanted, 600, f"{wanted}\n{log.read_text() if log.exists() else ''}")

    def saved() -> list[int]:
        return sorted(int(re.search(r"-ba(\d+)-", file.name)[1]) for file in folder.glob("ep*-rank0.pt"))

    def first_batch(restarts: str) -> int:
        def batches() -> list[int]:
            file = tmp_path / f"batches-{restarts}"
            return [int(n) for n in re.findall(r"time/batch: (\d+)", file.read_text())] if file.exists() else []

        until(lambda: len(batches()) > 5, 600, f"training\n{log.read_text() if log.exists() else ''}")
        return batches()[0]

    job = submit(1_000_000)
    assert first_batch("$SLURM_RESTART_COUNT") == 0
    slurm("scancel", "--signal=TERM", job)  # to the run only, as --signal does before the time limit
    state_is(job, "PENDING")
    (stopped,) = saved()
    time.sleep(3)  # earlier, the node confuses it with the job that it has just ended
    slurm("scontrol", "update", f"jobid={job}", "starttime=now")  # Slurm would wait for two minutes
    assert first_batch("1") == stopped
    slurm("scancel", job)
    state_is(job, "CANCELLED")
    until(lambda: len(saved()) == 2, 30, "saving, in the time that Slurm gives a cancelled job")
    last = saved()[-1] + 3
    job = submit(last)
    state_is(job, "COMPLETED")
    assert saved()[-1] == last
    assert "not-a-token" not in log.read_text() + slurm("scontrol", "show", "job", job)
