"""Trains a SiT:   composer [-n RANKS] sit_composer/train.py YAML [key=value ...]

Run the same command again to resume, or to be told that the run is finished.
"""

import argparse
import os
import sys
import time
from pathlib import Path

# A script run by its path finds its own folder first, where config.py, data.py and others would shadow modules of
# those names in other packages.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]
from sit_composer.cli import say
from sit_composer.config.checks import check
from sit_composer.config.data_fits import check_data, local_spec
from sit_composer.config.documentation import documentation
from sit_composer.config.load import load_config
from sit_composer.config.same_run import check_same_run
from sit_composer.errors import EVICTED, UserError


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 when trained, 2 for a mistake in the config or the data that it names."""
    parser = argparse.ArgumentParser(
        prog="composer sit_composer/train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys of the YAML, with defaults (???: must be given):\n" + documentation(),
    )
    parser.add_argument("yaml", help="the run's config, such as yamls/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="go over the YAML's, such as data.local=/data"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the run, its memory and its cost, check what it needs, and start nothing",
    )
    args = parser.parse_intermixed_args(argv)
    try:
        config = load_config(args.yaml, args.overrides)
        check(config)
        if args.dry_run:
            from sit_composer.training.dry_run import dry_run

            return dry_run(config)
        check_same_run(config)
        for section in ("data", "eval_data"):
            data = getattr(config, section)
            if data is not None and (spec := local_spec(data, section)) is not None:
                check_data(config, spec, section)
        from sit_composer.training.fit import train  # torch, Composer and streaming: only once the config is right

        if not train(config):
            say(f"{config.run_name}: told to end; saved. The same command goes on")
            return EVICTED
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes, from the last checkpoint", file=sys.stderr)
        return 130
    except UserError as error:
        if os.environ.get("RANK", "0") != "0" and "torch" not in sys.modules:
            # All ranks of a node have the same to say. Let rank 0 say it: the launcher ends the others when the first
            # one exits, and would make rank 0's "terminated" its own exit code. Another node may have its own mistake.
            time.sleep(60)
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
