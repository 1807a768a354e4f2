"""Image models whose attention or tokens are routed, beside controls: trains all arms, says what the cards say.

    python scripts/token_routing.py tokens --workdir=DIR [--seeds=3]       docs/zoo/dit_token_routing.md
    python scripts/token_routing.py regions --workdir=DIR [--seeds=3]      docs/zoo/biformer.md
    python scripts/token_routing.py picture --workdir=DIR --picture=FILE   which tokens take which depth, over the image

Every run is one of `scripts/train.py` with the settings that are printed; what DIR holds already is not run again.
Random gates let as many tokens through as the learned ones of the same budget and seed do.
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np

from moe_zoo.analysis.class_plots import plot_patch_depth
from moe_zoo.inference import load_classifier
from moe_zoo.train.config import load_config
from moe_zoo.train.loop import train
from moe_zoo.train.report import make_report
from moe_zoo.train.tasks import make_task

GATES = "model.gate."
#: arm -> settings; a string: random gates with the shares of that arm
TOKENS: dict[str, dict[str, str] | str] = {
    "all open": {GATES + "kind": "open"},
    "learned, mu 0.5": {"train.objective.share": "0.5"},
    "learned, mu 0.25": {"train.objective.share": "0.25"},
    "random as mu 0.5": "learned, mu 0.5",
    "random as mu 0.25": "learned, mu 0.25",
    "static, 2 of 4 stages": {GATES + "kind": "static", GATES + "static_stages": "2"},
    "static, 1 of 4 stages": {GATES + "kind": "static", GATES + "static_stages": "1"},
}
REGIONS: dict[str, dict[str, str]] = {
    "routed": {},
    "all": {"model.topk": "(-2, -2, -2)"},
    "random": {"model.select": "random"},
    "nearest": {"model.select": "nearest"},
}
EXPERIMENTS = {"tokens": ("vision/dyn_token_routing", TOKENS), "regions": ("vision/biformer", REGIONS)}


def outcome(config: str, folder: pathlib.Path, settings: dict[str, str], seed: int) -> dict[str, Any]:
    """The report of one run, made if it is not there, with the mean FLOPs of an image and depths of its tokens."""
    done = folder / "outcome.json"
    if done.is_file():
        return json.loads(done.read_text())
    given = settings | {"train.seed": str(seed), "data.seed": str(seed), "log.tensorboard": "false"}
    print(f"{folder.name}: " + " ".join(f"--config.{name}={value}" for name, value in given.items()), flush=True)
    made = load_config(config, list(given.items()))
    run = train(made, folder)
    report = make_report(made, folder, run)
    model, test = run["trainer"].model(run["state"]), run["parts"]["test"]
    told = {name: report[name] for name in ("accuracy", "bits", "layers", "train_seconds", "parameters")}
    told["flops"] = model.flops_per_example()
    if told["layers"]:
        told["most_flops"] = told["flops"]
        told["flops"] = model.fixed_flops() + sum(row["flops"] for row in told["layers"])
        told["depth"] = depths(load_classifier(folder), test)
    done.write_text(json.dumps(told, indent=2))
    return told


def shares(layers: list[dict[str, float]]) -> dict[str, float]:
    """Of all tokens of all nodes, how many gates of each kind are open. A row has a quarter of the tokens of the one
    before it.
    """
    stages = sum("scale_share" not in row for row in layers)  # the last row's nodes
    found = {}
    for name in ("depth_share", "scale_share"):
        rows = [(row[name], 0.25 ** (row["layer"] // stages)) for row in layers if name in row]
        found[name] = sum(share * weight for share, weight in rows) / sum(weight for _, weight in rows)
    return found


def depths(loaded, data, batch: int = 256) -> dict[str, Any]:
    """Of the finest row: how many blocks a token goes through, of tokens with ink in them and of others."""
    sums = np.zeros((2, 2))
    for begin in range(0, len(data) - batch + 1, batch):
        fields = {name: array[begin : begin + batch] for name, array in data.fields.items()}
        deep, ink = token_depth(loaded, fields)
        sums += [[deep[ink == kind].sum(), (ink == kind).sum()] for kind in (True, False)]
    return dict(zip(("foreground", "background"), (sums[:, 0] / sums[:, 1]).tolist()))


def token_depth(loaded, fields) -> tuple[np.ndarray, np.ndarray]:
    """(blocks that each token of the finest row goes through, whether a fifth of its pixels has ink), [B, Y, X]."""
    _, aux = loaded(record=True, **fields)
    gates_JBS = np.asarray(aux.terms()["rows.0"]["depth_gate"])
    side = loaded.config.views[0].height
    of_token = lambda x: x.reshape(len(x), side, 4, side, 4).mean((2, 4))
    return (gates_JBS > 1e-4).sum(0).reshape(-1, side, side), of_token(fields["foreground"]) >= 0.2


def run_all(which: str, workdir: pathlib.Path, seeds: int) -> None:
    """Trains what is missing, seed by seed, and prints a line per arm."""
    config, arms = EXPERIMENTS[which]
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for seed in range(seeds):
        for arm, settings in arms.items():
            if isinstance(settings, str):
                same = shares(found[settings][seed]["layers"])
                settings = {GATES + "kind": "random"} | {GATES + n: f"{share:.4f}" for n, share in same.items()}
            name = arm.replace(" ", "_").replace(",", "")
            found[arm].append(outcome(config, workdir / f"{which}_{name}_{seed}", settings, seed))
        say(found)


def say(found: dict[str, list[dict[str, Any]]]) -> None:
    """Means over the seeds that are there, with the lowest and highest."""
    for arm, runs in found.items():
        accuracy = [100 * run["accuracy"] for run in runs]
        line = f"{arm}: accuracy {np.mean(accuracy):.1f} ({min(accuracy):.1f} to {max(accuracy):.1f}), "
        line += f"bits {np.mean([run['bits'] for run in runs]):.3f}, "
        line += f"MFLOPs {np.mean([run['flops'] for run in runs]) / 1e6:.2f}"
        if runs[0].get("depth"):
            front, back = (np.mean([run["depth"][kind] for run in runs]) for kind in ("foreground", "background"))
            depth, scale = np.mean([list(shares(run["layers"]).values()) for run in runs], axis=0)
            line += f", open {depth:.2f} {scale:.2f}, depth of ink {front:.2f}, of clutter {back:.2f}"
        print(f"{line}, {len(runs)} seeds", flush=True)


def picture(workdir: pathlib.Path, path: pathlib.Path, arm: str, count: int = 6) -> None:
    """Draws the first test images of a finished run with the depth of every token."""
    folder = workdir / f"tokens_{arm.replace(' ', '_').replace(',', '')}_0"
    loaded = load_classifier(folder)
    settings = json.loads((folder / "config.json").read_text())
    overrides = [("data.seed", str(settings["data"]["seed"]))]
    test = make_task(load_config("vision/dyn_token_routing", overrides)).parts["test"]
    fields = {name: array[:: len(test) // count][:count] for name, array in test.fields.items()}
    deep, _ = token_depth(loaded, fields)
    plot_patch_depth(fields["images"][..., 0], deep, settings["model"]["stages"], path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=[*EXPERIMENTS, "picture"])
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="where the runs are")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", type=pathlib.Path, help="the PNG")
    parser.add_argument("--arm", default="learned, mu 0.5", help="of the picture")
    arguments = parser.parse_args()
    if arguments.what == "picture":
        if arguments.picture is None:
            parser.error("picture needs --picture=FILE")
        picture(arguments.workdir, arguments.picture, arguments.arm)
    else:
        run_all(arguments.what, arguments.workdir, arguments.seeds)


if __name__ == "__main__":
    main()
