"""One LoRA against each mixture of LoRA: the same base, tasks and questions, equal trained parameters.

compare_lora.py --list                                entries, their claims, their ranks, and what the store has
compare_lora.py --entries=lora,mola,arrow --seeds=3   trains what is missing (first the base), then writes the page
compare_lora.py --entries=all --seeds=3               every entry; an interrupted command goes on where it stopped
compare_lora.py --page                                only the page, from the store
compare_lora.py --cards                               figures of the adapters' cards in docs/zoo, from the store
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_zoo.cli import allocator, common
from moe_zoo.cli.compare import list_entries

#: where runs are kept, with their page
STORES = Path("docs/results/compare_lora")


def compare_lora(argv: Sequence[str]) -> None:
    """Does what the flags ask for, in this order: list, train, page, cards."""
    arguments = parse(argv)
    allocator.give_back()

    from moe_zoo.compare.adapters import plans
    from moe_zoo.compare.entries import pick
    from moe_zoo.compare.store import Store

    if arguments.scale not in plans.SCALES:
        raise common.ConfigError(
            f"--scale: unknown {arguments.scale!r}{common.nearest(arguments.scale, plans.SCALES)}; known: "
            f"{', '.join(plans.SCALES)}"
        )
    if arguments.seeds < 1:
        raise common.ConfigError(f"--seeds: expected at least 1, got {arguments.seeds}")
    known = plans.entries(arguments.entries)
    entries = pick(arguments.entries, known) if arguments.entries else []
    scale = plans.SCALES[arguments.scale]
    store = Store(arguments.store or STORES / f"{scale.name}.jsonl")
    if store.path.suffix != ".jsonl":
        raise common.ConfigError(f"--store: expected a file that ends in .jsonl, got {arguments.store!r}")
    if arguments.list:
        list_entries(entries or list(known.values()), store, lambda entry: plans.plan(entry, scale, 0))
    elif entries and not train(arguments, entries, scale, store):
        raise KeyboardInterrupt
    if arguments.page or arguments.cards or (entries and not arguments.list and store.keys()):
        from moe_zoo.compare.adapters import report
        from moe_zoo.compare.cards import write_changed

        if arguments.page or (entries and not arguments.list):
            print(f"page: {report.write_page(store, known, scale.name)}")
        if arguments.cards:
            for path in write_changed(report.cards(Path("docs/zoo"), store.path.parent)):
                print(f"card: {path}")


def parse(argv: Sequence[str]) -> Any:
    """The command line's arguments."""
    parser = common.Parser(
        prog="compare_lora", description=__doc__, formatter_class=common.argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--entries", default="", help="names or config files with commas between them, or all")
    add("--seeds", type=int, default=3, help="seeds 0, 1, ... of each entry (3)")
    add("--scale", default="cpu", help="cpu: a small base, eight tasks; tiny: a trial")
    add("--store", default=None, help=f"the store ({STORES}/SCALE.jsonl)")
    add("--workdir", default="runs/compare_lora", help="where the base is kept")
    add("--minutes", type=float, default=None, help="start no run after this time")
    add("--list", action="store_true", help="say what there is, train nothing")
    add("--page", action="store_true", help="write the page from the store, beside it")
    add("--cards", action="store_true", help="rewrite the figures in docs/zoo from the store")
    arguments, overrides = parser.parse_known(argv)
    if overrides:
        raise common.ConfigError("a comparison takes no --config.KEY=VALUE: what differs belongs into a config file")
    if not (arguments.entries or arguments.list or arguments.page or arguments.cards):
        raise common.ConfigError("nothing to do: give --entries, --list, --page or --cards; --help explains them")
    return arguments


def train(arguments: Any, entries: Sequence[Any], scale: Any, store: Any) -> bool:
    """Trains the missing runs: all entries with seed 0 first, so that part of the time gives part of the picture."""
    from moe_zoo.compare.adapters.plans import plan

    # settings first: a mistake in them must not wait for the base
    plans = [plan(entry, scale, seed) for seed in range(arguments.seeds) for entry in entries]

    import logging

    from moe_zoo.compare.adapters import bench, running
    from moe_zoo.compare.runner import run_all, use_compilation_cache

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    say = lambda text: print(f"== {text}", flush=True)
    until = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    workdir = Path(arguments.workdir).absolute()
    use_compilation_cache(workdir / "compiled")
    made = bench.prepare(scale, plans[0].held_in, workdir, say)
    say(f"{len(plans)} runs at scale {scale.name}, {len(made.corpus):,} questions, base and data {made.fingerprint}")
    return run_all(
        plans, store, made, workdir, say=say, until=until, make=running.run_one, outcome=running.outcome
    )  # fmt: skip


def main() -> None:
    """The process: parses sys.argv, exits with its code."""
    sys.exit(common.run(compare_lora))


if __name__ == "__main__":
    main()
