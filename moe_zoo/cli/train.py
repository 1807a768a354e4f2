"""Train a model: train.py --config=configs/quickstart.py --workdir=runs/quickstart [--config.KEY=VALUE ...]"""

import sys
from collections.abc import Sequence
from typing import Any

from moe_zoo.cli import common


def train(argv: Sequence[str]) -> dict[str, Any]:
    """Trains and reports. Returns the report."""
    parser = common.Parser(prog="train", description=__doc__)
    parser.add_argument("--config", required=True, help="a config file or the name of one, with :PRESET")
    parser.add_argument(
        "--workdir", required=True, help="where checkpoints, metrics and pictures go; resumes what is there"
    )
    parser.add_argument("--overwrite", action="store_true", help="remove the run that is in --workdir and start again")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments, overrides = parser.parse_known(argv)

    # settings first: a mistake in them must not wait for anything heavier
    from moe_zoo.train.config import differences, load_config

    config = load_config(arguments.config, overrides)
    if overrides:
        changed = differences(load_config(arguments.config).to_dict(), config.to_dict())
        print(f"config {arguments.config}, with {'; '.join(changed) or 'nothing changed'}", flush=True)
    else:
        print(f"config {arguments.config}", flush=True)

    from moe_zoo.train import loop
    from moe_zoo.train.reporting import final_table

    run = loop.train(config, arguments.workdir, overwrite=arguments.overwrite)
    outcome = {"workdir": arguments.workdir, "step": run["step"], "finished": run["finished"]}
    if not run["finished"]:
        if arguments.json:
            common.print_json(outcome)
        return outcome

    from moe_zoo.train.report import make_report

    report = make_report(config, arguments.workdir, run)
    final_table(report)
    if not report["causal"]:
        print(f"router {config.model.router.name!r} is not causal: these bits per byte can see the future")
    print(f"go on: sample.py --workdir={arguments.workdir} --prompt='...'   evaluate.py --workdir={arguments.workdir}")
    if arguments.json:
        common.print_json(outcome | report)
    return report


def main() -> None:
    """The process: parses sys.argv, exits with its code."""
    sys.exit(common.run(train))


if __name__ == "__main__":
    main()
