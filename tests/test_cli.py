"""What all commands share."""

import os
import subprocess
import sys

import pytest

from sit_composer import train
from sit_composer.cli import make_parser, s3_endpoint
from sit_composer.errors import INTERRUPTED, USAGE, UserError
from tests.helpers.paths import ROOT

NAMES = ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
RANK = """
import sys
from sit_composer.cli import leave, run_command
from sit_composer.errors import UserError

def work():
    import atexit, time, torch
    from torch import distributed
    rank = int(sys.argv[1])
    distributed.init_process_group("gloo", f"file://{sys.argv[2]}", rank=rank, world_size=4)
    atexit.register(print, "told at the end")
    summed = distributed.all_reduce(torch.ones(1), async_op=True).get_future()
    summed.then(lambda _: time.sleep(1))  # in Gloo's thread, which then wants Python's lock
    summed.wait()
    if rank == 1:
        raise UserError("wrong")
    if rank == 2:
        raise RuntimeError("worse")

leave(lambda: run_command(work))
"""


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_the_first_variable_that_is_set_names_the_store(monkeypatch):
    assert s3_endpoint() is None
    for number, name in reversed(list(enumerate(NAMES))):
        monkeypatch.setenv(name, f"http://[::1]:900{number}/x")
        assert s3_endpoint() == f"http://[::1]:900{number}/x"
    monkeypatch.setenv(NAMES[0], "")
    assert s3_endpoint() == "http://[::1]:9001/x"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("url", ["127.0.0.1:9", "user:secret@store:9000", "s3://store", "http:/store", "http://a_b:9"])
def test_an_address_that_no_client_takes_is_told_by_its_variable(monkeypatch, name, url):
    monkeypatch.setenv(name, url)
    with pytest.raises(UserError, match=rf"^{name}: got '.*', expected http:// or https://, a host") as raised:
        s3_endpoint()
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("override", ["trainer.save_folder=s3://b/r", "data.remote=s3://b/d"])
def test_a_run_asks_for_the_scheme_before_anything_is_loaded(monkeypatch, capsys, override):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9")
    assert train.main([str(ROOT / "yamls" / "quickstart.yaml"), override]) == USAGE
    assert capsys.readouterr().err.splitlines() == [
        "error: AWS_ENDPOINT_URL: got '127.0.0.1:9', expected http:// or https://, a host, and perhaps a port"
    ]


def test_a_path_from_home_needs_no_shell(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = make_parser("command", None)
    parser.add_argument("source")
    parser.add_argument("--out")
    parser.add_argument("--names", nargs="*")
    args = parser.parse_args(["~/source", "--out=~/out", "--names", "~", "a~/b", "~no-such-user/c"])
    assert (args.source, args.out) == ("/home/me/source", "/home/me/out")
    assert args.names == ["/home/me", "a~/b", "~no-such-user/c"]
    assert parser.parse_intermixed_args(["--out", "~/out", "~/source"]).source == "/home/me/source"


def test_a_mistake_in_the_options_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        make_parser("command", None).parse_args(["--none"])
    assert ended.value.code == USAGE
    assert capsys.readouterr().err == "error: unrecognized arguments: --none; see command --help\n"


def test_a_rank_ends_with_its_code_although_a_thread_of_gloo_needs_python_then(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    options = {"stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": env}
    with open("/dev/full", "w") as full:
        outs = [subprocess.PIPE, subprocess.PIPE, subprocess.PIPE, full]
        commands = [[sys.executable, "-c", RANK, str(rank), str(tmp_path / "group")] for rank in range(4)]
        ranks = [subprocess.Popen(c, stdout=out, **options) for c, out in zip(commands, outs, strict=True)]
        ended = [(*rank.communicate(timeout=60), rank.returncode) for rank in ranks]
    outputs, errors, codes = zip(*ended, strict=True)
    assert outputs == ("told at the end\n",) * 3 + (None,)
    assert codes[:3] == (0, USAGE, 1)
    assert codes[3] != 0  # its output is lost
    assert errors[:2] == ("", "error: wrong\n")
    assert errors[2].endswith("RuntimeError: worse\n")
    assert "No space left on device" in errors[3]


def test_a_second_interrupt_shows_nothing_while_a_rank_ends():
    code = "import atexit, os, signal; from sit_composer.cli import INTERRUPTED, leave; "
    code += "atexit.register(os.kill, os.getpid(), signal.SIGINT); leave(lambda: INTERRUPTED)"
    ended = subprocess.run([sys.executable, "-c", code], env={**os.environ, "WORLD_SIZE": "2"}, capture_output=True)
    assert (ended.stdout, ended.stderr, ended.returncode) == (b"", b"", INTERRUPTED)
