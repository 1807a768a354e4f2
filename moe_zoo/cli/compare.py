"""Which idea is better at equal cost.

compare.py --list                                     the entries, their claims, and what the store has
compare.py --entries=top_k,remoe,rmoe --seeds=3       trains what is missing, then writes the page
compare.py --entries=all --seeds=3                    every entry; an interrupted command goes on where it stopped
compare.py --page                                     only the page, from the store
compare.py --cards                                    figures of the cards in docs/zoo, from the store
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe_zoo.cli import allocator, common

#: where a prepared corpus is looked for
PREPARED = "runs/corpus"


def compare(argv: Sequence[str]) -> None:
    """Does what the flags ask for, in this order: list, train, page, cards."""
    arguments = parse(argv)
    allocator.give_back()

    from moe_zoo.compare.entries import MATCHES, SCALES, load_entries, pick, plan
    from moe_zoo.compare.store import Store

    for flag, given, known in (("scale", arguments.scale, SCALES), ("match", arguments.match, MATCHES)):
        if given not in known:
            raise common.ConfigError(
                f"--{flag}: unknown {given!r}{common.nearest(given, known)}; known: {', '.join(known)}"
            )
    if arguments.seeds < 1:
        raise common.ConfigError(f"--seeds: expected at least 1, got {arguments.seeds}")
    known = load_entries(arguments.entries)
    entries = pick(arguments.entries, known) if arguments.entries else []
    scale = SCALES[arguments.scale]
    store = Store(arguments.store or Path("docs/results/compare") / f"{scale.name}.jsonl")
    if store.path.suffix != ".jsonl":
        raise common.ConfigError(f"--store: expected a file that ends in .jsonl, got {arguments.store!r}")
    if arguments.list:
        list_entries(entries or list(known.values()), store, lambda entry: plan(entry, scale, 0, by=arguments.match))
    elif entries and not train(arguments, entries, scale, store):
        raise KeyboardInterrupt
    if arguments.page or (entries and not arguments.list and store.keys()):
        from moe_zoo.compare.page import write_page

        written = write_page(store, known, scale.name, arguments.match)
        print(f"page: {written}")
    if arguments.cards:
        from moe_zoo.compare.cards import write_cards

        for path in write_cards(Path("docs/zoo"), store.path.parent):
            print(f"card: {path}")


def parse(argv: Sequence[str]) -> Any:
    """The command line's arguments."""
    parser = common.Parser(prog="compare", description=__doc__, formatter_class=common.argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--entries", default="", help="names or config files with commas between them, or all")
    add("--seeds", type=int, default=3, help="seeds 0, 1, ... of each entry (3)")
    add(
        "--scale",
        default="cpu",
        help="cpu: minutes a run on 2 cores; gpu: minutes on one H100; pod: only listed; tiny: a trial",
    )
    add("--match", default="active", help="what the experts' width makes equal: active FLOPs, total parameters, none")
    add("--data", default=None, help="data.source of every run; runs/corpus if it is there, else embedded")
    add("--store", default=None, help="the store (docs/results/compare/SCALE.jsonl)")
    add("--workdir", default="runs/compare", help="where runs train until they are in the store")
    add("--minutes", type=float, default=None, help="start no run after this time")
    add("--list", action="store_true", help="say what there is, train nothing")
    add("--page", action="store_true", help="write the page from the store, beside it")
    add("--cards", action="store_true", help="rewrite the figures in docs/zoo from the stores")
    arguments, overrides = parser.parse_known(argv)
    if overrides:
        raise common.ConfigError("a comparison takes no --config.KEY=VALUE: what differs belongs into a config file")
    if not (arguments.entries or arguments.list or arguments.page or arguments.cards):
        raise common.ConfigError("nothing to do: give --entries, --list, --page or --cards; --help explains them")
    return arguments


def train(arguments: Any, entries: Sequence[Any], scale: Any, store: Any) -> bool:
    """Trains the missing runs: all entries with seed 0 first, so that part of the time gives part of the picture."""
    from moe_zoo.compare.entries import plan

    if not scale.trains:
        raise common.ConfigError(
            f"--scale={scale.name} is a configuration only: scripts/train.py --config=configs/ENTRY.py:{scale.name} "
            "trains it where the devices are"
        )
    source = arguments.data or default_source()
    plans = [
        plan(entry, scale, seed, by=arguments.match, source=source)
        for seed in range(arguments.seeds)
        for entry in entries
    ]  # settings first: a mistake in them must not wait for the data

    from moe_zoo.compare.runner import run_all
    from moe_zoo.data import load_corpus, load_tokenizer

    corpus = load_corpus(source, load_tokenizer(plans[0].config.data.tokenizer))
    say = lambda text: print(f"== {text}", flush=True)
    say(f"{len(plans)} runs at scale {scale.name}, matched by {arguments.match}, on {source} ({corpus.fingerprint})")
    until = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    return run_all(plans, store, corpus, Path(arguments.workdir), say=say, until=until)


def default_source() -> str:
    """What is trained on if nothing is said: `prepare_data.py --out=runs/corpus` if that was made, else embedded."""
    return PREPARED if Path(PREPARED).is_dir() else "embedded"


def list_entries(entries: Sequence[Any], store: Any, plan: Callable[[Any], Any]) -> None:
    """Prints each entry: its claim, how its `plan` is matched, and the seeds that the store has of these settings."""
    from moe_zoo.compare.claims import Claim

    runs = store.read()
    for entry in entries:
        planned = plan(entry)
        mine = [run for run in runs if run["entry"] == entry.name]
        seeds = sorted(run["seed"] for run in mine if run["config_hash"] == planned.config_hash)
        other = len(mine) - len(seeds)
        print(f"{entry.name}: {entry.claim.says}")
        if isinstance(entry.claim, Claim):
            print(f"    claim   {entry.claim.short()} ({entry.claim.source})")
        print(f"    matched {planned.match.says()}")
        print(f"    stored  seeds {seeds or 'none'}" + (f", {other} runs of other settings" if other else ""))


def main() -> None:
    """The process: parses sys.argv, exits with its code."""
    sys.exit(common.run(compare))


if __name__ == "__main__":
    main()
