"""Train a model: train.py --config=configs/quickstart.py --workdir=runs/quickstart [--config.KEY=VALUE ...]"""

import argparse
import importlib
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from moe_zoo.cli import allocator, common
from moe_zoo.train import peers
from moe_zoo.train.peers import PeersConfig

#: paths of what belongs to a router, or is shared by the routers of all layers
ROUTERS_OWN = re.compile(r"\.router\.|^shared\.")


def train(argv: Sequence[str]) -> dict[str, Any] | None:
    """Trains and reports, with the other processes of the run if there are any. Returns the report (process 0's)."""
    arguments, overrides = parse(argv)
    who = PeersConfig(**{field.name: getattr(arguments, field.name) for field in fields(PeersConfig)})
    with peers.joined(who):
        return train_and_report(arguments, overrides)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """(arguments, overrides) of the command line."""
    parser = common.Parser(prog="train", description=__doc__)
    add = parser.add_argument
    add("--config", required=True, help="a config file or the name of one, with :PRESET")
    add("--workdir", required=True, help="where checkpoints, metrics and pictures go; resumes what is there")
    add(
        "--init-from", metavar="PATH",
        help="begin with the weights, model settings and tokenizer of a run or checkpoint",
    )  # fmt: skip
    add(
        "--writer", metavar="MODULE:NAME", action="append", default=[],
        help="another logger: called without arguments, gives an object with write, truncate_after and close",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="remove the run that is in --workdir and start again")
    add("--json", action="store_true", help="end with one line of JSON")
    several = parser.add_argument_group("several processes", "the same command in each; docs/distributed.md")
    add = several.add_argument
    add(
        "--distributed", dest="auto", action="store_true", help="who is who is found out: TPU pod, SLURM, GKE, Open MPI"
    )
    add("--coordinator", metavar="HOST:PORT", help="address of process 0")
    add("--processes", type=int, metavar="N", help="how many there are")
    add("--process", type=int, metavar="I", help="which one this is, 0 to N - 1")
    add("--connect-timeout", type=int, metavar="SECONDS", default=300, help="until all must be there (300)")
    add("--peer-timeout", type=int, metavar="SECONDS", default=30, help="a process is lost after this silence (30)")
    return parser.parse_known(argv)


def train_and_report(arguments: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> dict[str, Any] | None:
    """The work of one process."""
    allocator.give_back()
    # settings first: a mistake in them must not wait for anything heavier
    from moe_zoo.train.config import differences, load_config

    given, weights = begin_from(arguments.init_from, overrides) if arguments.init_from else (None, None)
    config = load_config(arguments.config, overrides, given)
    writers = [make_writer(spec) for spec in arguments.writer]
    changed = differences(load_config(arguments.config, (), given).to_dict(), config.to_dict()) if overrides else []
    print(f"config {arguments.config}" + (f", with {'; '.join(changed)}" if changed else ""), flush=True)

    from moe_zoo.train import loop
    from moe_zoo.train.reporting import final_table

    run = loop.train(
        config, arguments.workdir, overwrite=arguments.overwrite, begin_from=weights, writers=writers
    )  # fmt: skip
    outcome = {"workdir": arguments.workdir, "step": run["step"], "finished": run["finished"]}
    if not run["finished"]:
        if arguments.json:
            common.print_json(outcome)
        return outcome

    from moe_zoo.train.report import make_report

    report = make_report(config, arguments.workdir, run)
    if report is None:  # not process 0
        return None
    final_table(report)
    if not report.get("causal", True):
        print(f"router {config.model.router.name!r} is not causal: these bits per byte can see the future")
    common.say_as_trained(report)
    sample = f"sample.py --workdir={arguments.workdir} --prompt='...'   " if run["tokenizer"] else ""
    print(f"go on: {sample}evaluate.py --workdir={arguments.workdir}")
    if arguments.json:
        common.print_json(outcome | report)
    return report


def begin_from(path: str, overrides: Sequence[tuple[str, str]] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings that come with the weights at `path`, the weights by our paths).

    With overrides of `model.router` the routers' weights are left out: another router begins with its own.
    """
    from moe_zoo.core.param import arrays
    from moe_zoo.core.schema import to_dict
    from moe_zoo.inference import load

    loaded = load(path)
    print(f"begins from {path}: its model settings and tokenizer take the place of the config's", flush=True)
    weights = arrays(loaded.model)
    if any(key.startswith("model.router") for key, _ in overrides):
        weights = {name: value for name, value in weights.items() if not ROUTERS_OWN.search(name)}
    return {"model": to_dict(loaded.config), "data": {"tokenizer": loaded.tokenizer_spec}}, weights


def make_writer(spec: str) -> Any:
    """`module:name` -> what that callable returns. Raises ConfigError if it is not a writer."""
    module, _, name = spec.partition(":")
    try:
        writer = getattr(importlib.import_module(module), name)()
    except Exception as error:
        raise common.ConfigError(f"--writer={spec}: {type(error).__name__}: {error}; expected MODULE:NAME") from error
    missing = [method for method in ("write", "truncate_after", "close") if not callable(getattr(writer, method, None))]
    if missing:
        raise common.ConfigError(f"--writer={spec}: what it returns has no {', '.join(missing)}")
    return writer


def main() -> None:
    """The process: parses sys.argv, exits with its code."""
    peers.end(peers.exit_code(lambda: common.run(train)))


if __name__ == "__main__":
    main()
