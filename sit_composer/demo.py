"""A page to generate images on:   python -m sit_composer.demo CHECKPOINT [CHECKPOINT …]

Choose a class, guidance, a solver, weights and a seed, and watch the images form from noise. Several checkpoints are
shown side by side, from the same noise. The images are those of sit_composer.sample, whose command the page shows.
The page is for this machine alone, unless --host is another address: it has no password. It needs no internet.
Ctrl-C ends it.
"""

import argparse
import errno
import os
import socket
import sys

from sit_composer.bounds import Bounds
from sit_composer.cli import announce, check_checkpoint, hand_over, make_parser, number, require, run_command
from sit_composer.errors import UserError

PORT = Bounds(1, 65535, whole=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options, once the checkpoints and Gradio were found."""
    parser = make_parser("python -m sit_composer.demo", __doc__)
    option = parser.add_argument
    option("checkpoints", nargs="+", metavar="CHECKPOINT", help="as of sit_composer.sample; several are compared")
    option("--host", default="127.0.0.1", help="the address it listens on; 0.0.0.0 is all (127.0.0.1)")
    option("--port", type=number(PORT), metavar="N", help="(the first free one from 7860 on)")
    option("--device", default="auto", help="cpu, cuda, or cuda:1 and so on; auto is cuda if there is a GPU (auto)")
    args = parser.parse_args(argv)
    if (ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UserError(f"WORLD_SIZE: got {ranks}, expected one process; run python -m sit_composer.demo")
    for path in args.checkpoints:
        if args.checkpoints.count(path) > 1:
            raise UserError(f"CHECKPOINT: {path} is given twice")
        check_checkpoint(argparse.Namespace(checkpoint=path))
    require("sit_composer.demo", "gradio")
    args.host = args.host.removeprefix("[").removesuffix("]")
    check_address(args.host, args.port)
    return args


def check_address(host: str, port: int | None) -> None:
    """Raises UserError if nothing can listen there; Gradio would try for minutes, and give another reason."""
    try:
        found = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)
        socket.create_server(found[0][4], family=found[0][0]).close()
    except (OSError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (")[0]
        if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES):
            raise UserError(f"--port: {port} can't be used ({reason}); choose another") from None
        raise UserError(f"--host: got {host!r}, expected an address of this machine ({reason})") from None


def serve(argv: list[str] | None) -> int | None:
    args = parse(argv)
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_SHARE"):  # which Gradio would ask its makers' servers for
        os.environ[name] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    for name in ("no_proxy", "NO_PROXY"):  # Gradio asks its own page whether it is there
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1,localhost", args.host)))
    announce("gradio")
    return hand_over("sit_composer.demo_page", args, "torch")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 for a mistake that it names, 130 after Ctrl-C, which ends the page."""
    return run_command(lambda: serve(argv))


if __name__ == "__main__":
    sys.exit(main())
