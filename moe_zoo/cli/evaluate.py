"""The score of a run on a split: evaluate.py --workdir=runs/quickstart [--split=test] [--source=FILE]"""

import sys
from collections.abc import Sequence
from pathlib import Path

from moe_zoo.cli import common


def evaluate(argv: Sequence[str]) -> None:
    """Prints the score of a run on a split, or on other data."""
    parser = common.Parser(prog="evaluate", description=__doc__)
    parser.add_argument("--workdir", required=True, help="a run")
    parser.add_argument("--split", default="test", choices=["train", "validation", "test", "all"])
    parser.add_argument("--source", default=None, help="other data than the run's own; scored whole")
    parser.add_argument("--stride", type=int, default=None, help="window step; the run's own if not given")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments, overrides = parser.parse_known(argv)
    if overrides:
        raise common.ConfigError("a run's config is fixed; --config.KEY=VALUE is for train.py")

    from moe_zoo.data import compressed_bits_per_byte, load_corpus, split
    from moe_zoo.inference.loaded import load, read_settings
    from moe_zoo.train.evaluate import evaluate as score
    from moe_zoo.train.reporting import final_table

    settings = read_settings(Path(arguments.workdir))["data"]
    if "name" in settings:
        return _evaluate_classes(arguments)
    loaded = load(arguments.workdir)
    corpus = load_corpus(arguments.source or settings["source"], loaded.tokenizer)
    if arguments.source is None and arguments.split != "all":
        corpus = split(corpus, tuple(settings["fractions"]), settings["seed"], tokenizer=loaded.tokenizer)[
            arguments.split
        ]
    stride = arguments.stride or settings["eval_stride"]
    if stride is not None and not 1 <= stride <= settings["seq_len"]:
        raise common.ConfigError(f"--stride: expected 1 to {settings['seq_len']} (the run's seq_len), got {stride}")
    of = lambda model: score(
        model, corpus, loaded.tokenizer, seq_len=settings["seq_len"], stride=stride,
        batch_size=settings["eval_batch_size"],
    )  # fmt: skip
    result = of(loaded.model)
    if loaded.model.competes:
        as_trained = of(loaded.model.as_trained())
        result["as_trained"] = {name: as_trained[name] for name in ("bits_per_byte", "loss")}
    compressed = compressed_bits_per_byte(corpus, loaded.tokenizer)
    for kind in ("gzip", "xz"):
        result[kind] = {name: values[kind] for name, values in compressed.items()}
    result["split"] = arguments.source or arguments.split
    final_table(result)
    common.say_as_trained(result)
    if arguments.json:
        common.print_json(result)


def _evaluate_classes(arguments) -> None:
    from moe_zoo.data.labelled import PARTS
    from moe_zoo.inference.classify import load_classifier
    from moe_zoo.inference.loaded import read_settings
    from moe_zoo.train.config import config_from_dict
    from moe_zoo.train.reporting import final_table
    from moe_zoo.train.tasks import make_task

    if arguments.source or arguments.stride or arguments.split not in PARTS:
        raise common.ConfigError(f"a classifier is scored on its own data: --split of {', '.join(PARTS)}, no more")
    settings = read_settings(Path(arguments.workdir))
    task = make_task(config_from_dict({name: value for name, value in settings.items() if name != "corpus"}))
    result = task.score(load_classifier(arguments.workdir).model, arguments.split)
    final_table(result | {"split": arguments.split})
    if arguments.json:
        common.print_json(result | {"split": arguments.split})


def main() -> None:
    """The process: parses sys.argv, exits with its code."""
    sys.exit(common.run(evaluate))
