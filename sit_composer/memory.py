"""What a run takes, in memory and in time, computed from its config:   python -m sit_composer.memory YAML

Weights, gradients, AdamW's moments and the average are counted; what the passes hold is `live_bytes`'. The CUDA
context, NCCL's buffers, the operators' workspaces and fragmentation are not known: the reserve is for them. The sums
were compared with measured peaks of training on a CPU, FSDP2's on one rank (between several, a CPU's collectives
hold buffers that aren't counted), and never with a GPU's.
"""

import argparse
import re
import sys

from sit_composer.config.checks import check
from sit_composer.config.load import load_config
from sit_composer.errors import UserError

RANKS = (1, 8, 16, 32, 64)
# What memory doesn't depend on, so that a YAML whose data and folder are still to be given can be asked.
UNIMPORTANT = ("run_name=memory", "data.remote=null", "data.local=memory", "eval_data=null", "frechet=null",
               "trainer.save_folder=memory")  # fmt: skip


def numbers(text: str) -> list[int]:
    """1,8,16 as a list."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"got {text!r}; it takes whole numbers above 0, such as 1,8,16")
    return [int(number) for number in text.split(",")]


def fraction(text: str) -> float:
    """A number in (0, 1]."""
    if not re.fullmatch(r"\d*\.?\d+", text) or not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; it takes a number above 0, up to 1")
    return float(text)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake in the config."""
    parser = argparse.ArgumentParser(
        prog="python -m sit_composer.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("yaml", help="the run's config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="go over the YAML's")
    parser.add_argument("--ranks", type=numbers, help="numbers of GPUs [1,8,16,32,64]")
    parser.add_argument("--microbatch", type=numbers, help="samples a GPU at a time")
    parser.add_argument("--mfu", type=fraction, default=0.4, help="part of the peak FLOP/s that is reached [0.4]")
    parser.add_argument("--samples", type=int, help="of the data, where max_duration is in epochs")
    parser.add_argument("--cpu", action="store_true", help="the memory of training on a CPU")
    parser.add_argument("--encode", action="store_true", help="pictures are encoded in every step")
    parser.add_argument("--all-sizes", action="store_true", help="only the largest microbatch for S, B, L and XL")
    args = parser.parse_intermixed_args(argv)
    if args.all_sizes and (args.microbatch or args.samples or args.cpu or args.encode or len(args.ranks or [8]) > 1):
        parser.error("argument --all-sizes: goes with --ranks N [8], and nothing else")
    try:
        config = load_config(args.yaml, [*UNIMPORTANT, *args.overrides])
        check(config, ranks=max(1, config.fsdp.data_parallel_replicate_degree) if config.fsdp else 1)
        from sit_composer.costs import tables  # torch: only once the config is right
        from sit_composer.costs.estimate import encoder_memory

        if args.all_sizes:
            print(tables.size_table(config, (args.ranks or [8])[0]))
            return 0
        args.ranks, args.microbatch = args.ranks or list(RANKS), args.microbatch or list(tables.MICROBATCHES)
        encoder = encoder_memory(config) if args.encode else (0, 0)
        print(tables.describe(config) + "\n")
        print(tables.memory_tables(config, args.ranks, args.microbatch, not args.cpu, encoder) + "\n")
        print(tables.cost_table(config, args.ranks, args.mfu, args.samples))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
