"""What all commands share."""

import pytest

from sit_composer import train
from sit_composer.cli import make_parser, s3_endpoint
from sit_composer.errors import USAGE, UserError
from tests.helpers.paths import ROOT

NAMES = ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


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
