"""The memory and the time of a run, computed from its config:   python -m sit_composer.memory YAML

Weights, gradients, AdamW's moments and the average are counted, and the tensors that the forward and backward passes
hold are added. The CUDA context, NCCL's buffers, the operators' workspaces and fragmentation are unknown: the reserve
is for them. The totals were compared with measured peaks of training on a CPU, for FSDP2 on one rank (between several,
a CPU's collectives hold buffers that aren't counted), and never with a GPU's.
"""

import argparse
import re
import sys

from sit_composer.bounds import Bounds
from sit_composer.choices import COUNT
from sit_composer.cli import load, make_parser, number, run_command
from sit_composer.config.checks import check
from sit_composer.config.load import load_config

RANKS = (1, 8, 16, 32, 64)
# Keys that memory doesn't depend on, so that a YAML without its data and its folder is accepted.
UNIMPORTANT = ("run_name=memory", "data.remote=null", "data.local=memory", "eval_data=null", "frechet=null",
               "trainer.save_folder=memory")  # fmt: skip


def numbers(text: str) -> list[int]:
    """1,8,16 as a list."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected whole numbers above 0, such as 1,8,16")
    return [int(part) for part in text.split(",")]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake in the config."""
    parser = make_parser("python -m sit_composer.memory", __doc__)
    parser.add_argument("yaml", help="the run's config")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="override the YAML's keys")
    parser.add_argument("--ranks", type=numbers, help="numbers of GPUs [1,8,16,32,64]")
    parser.add_argument("--microbatch", type=numbers, help="numbers of samples that a GPU trains at a time")
    mfu = number(Bounds(0, 1, above=True))
    parser.add_argument("--mfu", type=mfu, default=0.4, help="fraction of the peak FLOP/s that is reached [0.4]")
    parser.add_argument("--samples", type=number(COUNT), help="number of samples, if max_duration is in epochs")
    parser.add_argument("--cpu", action="store_true", help="the memory of training on a CPU")
    parser.add_argument("--encode", action="store_true", help="images are encoded in every step")
    parser.add_argument("--all-sizes", action="store_true", help="only the largest microbatch, for S, B, L and XL")
    args = parser.parse_intermixed_args(argv)
    if args.all_sizes and (args.microbatch or args.samples or args.cpu or args.encode or len(args.ranks or [8]) > 1):
        parser.error("argument --all-sizes: expected at most --ranks N [8] beside it, no other option")
    return run_command(lambda: print(report(args)))


def report(args: argparse.Namespace) -> str:
    """The tables that the arguments ask for."""
    config = load_config(args.yaml, [*UNIMPORTANT, *args.overrides])
    check(config, ranks=max(1, config.fsdp.data_parallel_replicate_degree) if config.fsdp else 1)
    load("torch")
    from sit_composer.costs import estimate, tables  # load torch, once the config is valid

    if args.all_sizes:
        return tables.size_table(config, (args.ranks or [8])[0])
    ranks, encoder = args.ranks or RANKS, estimate.encoder_memory(config) if args.encode else (0, 0)
    memory = tables.memory_tables(config, ranks, args.microbatch or tables.MICROBATCHES, not args.cpu, encoder)
    return "\n\n".join([tables.describe(config), memory, tables.cost_table(config, ranks, args.mfu, args.samples)])


if __name__ == "__main__":
    sys.exit(main())
