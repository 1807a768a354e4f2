"""Which idea is better at equal training FLOPs, each at the width that suits it best.

isoflop.py --entries=dense,mod --widths=64,96,128 --list      what each run would be, and the command for it alone
isoflop.py --entries=dense,mod --widths=64,96,128 --seeds=3   trains what is missing, then writes table and picture
isoflop.py --entries=random_depth --widths=96                 one more entry; --page alone writes from the store

The first entry of --page is what the others are compared with.
"""

import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_zoo.cli import allocator, common
from moe_zoo.cli.compare import default_source


def isoflop(argv: Sequence[str]) -> None:
    """Does what the flags ask for."""
    arguments = parse(argv)
    allocator.give_back()

    from moe_zoo.compare.isoflop import plan
    from moe_zoo.compare.store import Store

    source = arguments.data or default_source()
    plans = [
        plan(name, width, seed, scale=arguments.scale, budget=arguments.budget, source=source)
        for seed in range(arguments.seeds) for name in arguments.entries for width in arguments.widths
    ]  # fmt: skip
    store = Store(arguments.store)
    if arguments.list:
        for planned in (p for p in plans if p.seed == 0):
            print(f"{planned.entry.name} at {planned.width}: {planned.match.says()}\n    {planned.command()}")
        return
    if plans and not train(arguments, plans, store, source):
        raise KeyboardInterrupt
    write(store, arguments)


def train(arguments: Any, plans: Sequence[Any], store: Any, source: str) -> bool:
    """Trains the missing runs: all with seed 0 first."""
    from moe_zoo.compare.isoflop import run_one
    from moe_zoo.compare.runner import run_all
    from moe_zoo.data import load_corpus, load_tokenizer

    corpus = load_corpus(source, load_tokenizer(plans[0].config.data.tokenizer))
    say = lambda text: print(f"== {text}", flush=True)
    say(f"{len(plans)} runs of {plans[0].match.budget:.3g} FLOPs on {source} ({corpus.fingerprint})")
    until = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    outcome = lambda run: (
        f"width {run['width']}: {run['results']['test_bits_per_byte']:.4f} test bits per byte "
        f"({run['timing']['wall_seconds']:.0f} s in all)"
    )
    make = functools.partial(run_one, rows=arguments.rows)
    return run_all(plans, store, corpus, Path(arguments.workdir), say=say, until=until, make=make, outcome=outcome)


def write(store: Any, arguments: Any) -> None:
    """Table and picture of the store's runs at this budget, beside the store."""
    from moe_zoo.compare.isoflop import BUDGET_OF, curves, draw, table

    runs = [run for run in store.read() if run["scale"] == arguments.scale]
    budgets = sorted({run["budget"] for run in runs})
    if not runs:
        raise common.ConfigError(f"--store={arguments.store}: no run of scale {arguments.scale}; give --entries")
    for budget in budgets:
        mine = [run for run in runs if run["budget"] == budget]
        names = sorted({run["entry"] for run in mine}, key=lambda name: (name != BUDGET_OF, name))
        found = curves(mine, names)
        print(f"\n{budget:.3g} FLOPs of training, scale {arguments.scale}\n\n{table(found)}")
        name = store.path.stem + ("" if len(budgets) == 1 else f"_{budget:.2g}")
        print(f"\npicture: {draw(found, store.path.with_name(f'{name}.png'))}")


def parse(argv: Sequence[str]) -> Any:
    """The command line's arguments."""
    parser = common.Parser(prog="isoflop", description=__doc__, formatter_class=common.argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--entries", default="", help="names of configs with commas between them")
    add("--widths", default="", help="hidden sizes of each")
    add("--seeds", type=int, default=3, help="seeds 0, 1, ... of each (3)")
    add("--budget", type=float, default=1.0, help="times what the dense decoder costs at this scale (1)")
    add("--scale", default="cpu", help="preset of the configs: cpu, gpu, tiny")
    add("--rows", type=int, default=1024, help="evenly spaced windows of the test split that are scored (1024)")
    add("--data", default=None, help="data.source of every run; runs/corpus if it is there, else embedded")
    add("--store", default="docs/results/isoflop/cpu.jsonl", help="where runs are kept, a line each")
    add("--workdir", default="runs/isoflop", help="where runs train until they are in the store")
    add("--minutes", type=float, default=None, help="start no run after this time")
    add("--list", action="store_true", help="say what would be trained, train nothing")
    add("--page", action="store_true", help="only table and picture, from the store")
    arguments, overrides = parser.parse_known(argv)
    if overrides:
        raise common.ConfigError("equal budgets take no --config.KEY=VALUE: what differs belongs into a config file")
    arguments.entries = [name for name in arguments.entries.split(",") if name]
    try:
        arguments.widths = [int(width) for width in arguments.widths.split(",") if width]
    except ValueError as error:
        raise common.ConfigError(f"--widths: expected numbers like 64,96, got {arguments.widths!r}") from error
    if arguments.seeds < 1 or arguments.rows < 1 or arguments.budget <= 0:
        raise common.ConfigError("--seeds, --rows and --budget must be above zero")
    if not arguments.page and not (arguments.entries and arguments.widths):
        raise common.ConfigError("nothing to do: give --entries and --widths, or --page; --help explains them")
    return arguments


def main() -> None:
    """The process: parses sys.argv, exits with its code."""
    sys.exit(common.run(isoflop))


if __name__ == "__main__":
    main()
