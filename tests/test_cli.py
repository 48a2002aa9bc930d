"""What all commands share."""

from sit_composer.cli import make_parser


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
