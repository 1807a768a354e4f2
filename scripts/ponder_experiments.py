"""How many layers an example takes: rules of leaving an encoder early, on pointers to follow over 1 to 4 places.

    python scripts/ponder_experiments.py [--seeds=3]

Two models per seed, both of 6 shared layers (`configs/encoder/palbert.py`): one learns by the probability of leaving
behind each layer (PALBERT), one by all layers' losses (PABEE). The first is left by quantile, for a sweep of quantiles
that needs no training, or by drawing, five times; the second by patience, or behind a fixed layer. Runs go to
docs/results/attention/ponder.json, where they are counted as done; what is printed are the tables of the card.
"""

from moe_zoo.cli import allocator

if __name__ == "__main__":
    allocator.use()

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_zoo.compare.runner import circumstances
from moe_zoo.core.schema import overlay
from moe_zoo.data.chase import PointersConfig
from moe_zoo.models.ponder import Ponder
from moe_zoo.sharding import make_mesh
from moe_zoo.train.config import config_from_dict, load_config
from moe_zoo.train.step import Trainer

RESULTS = Path("docs/results/attention/ponder.json")
MODELS: dict[str, dict[str, Any]] = {"palbert": {}, "pabee": {"train": {"objective": {"weights": "depth"}}}}
QUANTILES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
DRAWS, TESTS = 5, 4096


def trained(name: str, seed: int) -> tuple[Ponder, Any]:
    """(model, examples that it has not seen)."""
    tree = overlay(load_config("configs/encoder/palbert.py").to_dict(), MODELS[name])
    config = config_from_dict(overlay(tree, {"train": {"seed": seed}}))
    data = config.data.source.make().load()
    config.model.check_examples(data)
    seen, steps = data.select(np.arange(len(data) - TESTS)), config.train.steps
    trainer = Trainer(config, make_mesh(devices=jax.devices()[:1]), config.train.objective.make())
    state, random = trainer.init_state(), np.random.default_rng(seed)
    for step in range(steps):
        rows = random.integers(0, len(seen), config.data.batch_size)
        state, stats = trainer.train_step(state, seen.rows(rows), np.float32(step / steps))
        if step % 100 == 99:
            told = {k: round(float(stats["scalars"][k]), 3) for k in ("loss", "accuracy", "depth")}
            print(f"  {name}, seed {seed}, step {step + 1}: {told}", flush=True)
    return trainer.model(state), data.select(np.arange(len(data) - TESTS, len(data)))


@jax.jit
def _answers(model: Ponder, tokens, key):
    logits, depth, _ = model.answer(tokens, jnp.ones(len(tokens), bool), key)
    return logits.argmax(-1), depth


def asked(model: Ponder, test, seed: int = 0, **rule: Any) -> dict[str, float]:
    """{"accuracy", "layers" on average, "correlation" of layers with steps}, of one rule of leaving."""
    tokens = test.fields["tokens"]
    guess, depth = jax.device_get(_answers(model.leaving_by(**rule), tokens, jax.random.key(seed)))
    steps = PointersConfig().steps(tokens)
    together = float(np.corrcoef(depth, steps)[0, 1]) if depth.std() else 0.0
    return {"accuracy": float((guess == test.labels).mean()), "layers": float(depth.mean()), "correlation": together}


def run(seed: int) -> dict[str, list[dict[str, float]]]:
    """What every rule makes of the models of a seed."""
    model, test = trained("palbert", seed)
    L = model.config.num_hidden_layers
    found = {
        "quantile": [asked(model, test, quantile=q) for q in QUANTILES],
        "sample": [asked(model, test, draw, exit="sample") for draw in range(DRAWS)],
        "expectation": [asked(model, test, exit="expectation")],
        "its own layers": [asked(model, test, exit="fixed", depth=depth) for depth in range(1, L + 1)],
    }
    model, test = trained("pabee", seed)
    found["patience"] = [asked(model, test, exit="patience", patience=patience) for patience in range(1, L)]
    found["fixed"] = [asked(model, test, exit="fixed", depth=depth) for depth in range(1, L + 1)]
    return found


def table(runs: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """One line for every rule: means over seeds, and of drawing the spread of its draws within a seed."""
    lines = ["| left by | layers | accuracy | correlation of layers with steps |", "|---|---|---|---|"]
    mean = lambda rule, i, what: [run[rule][i][what] for run in runs.values()]
    labels = {
        "quantile": [f"q = {q}" for q in QUANTILES], "expectation": ["the mean of all"], "sample": None,
        "patience": [f"patience {i + 1}" for i in range(len(next(iter(runs.values()))["patience"]))],
        "its own layers": None, "fixed": None,
    }  # fmt: skip
    for rule, names in labels.items():
        count = len(next(iter(runs.values()))[rule])
        for i in range(1 if rule == "sample" else count):
            name = {"sample": "drawing"}.get(rule, f"{rule}, {i + 1}") if names is None else names[i]
            cells = []
            for what in ("layers", "accuracy", "correlation"):
                values = mean(rule, i, what)
                cells.append(f"{np.mean(values):.3f} +- {np.std(values, ddof=1):.3f}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    for what in ("accuracy", "layers"):
        draws = [np.std([draw[what] for draw in run["sample"]], ddof=1) for run in runs.values()]
        lines.append(f"\nstandard deviation of {what} over {DRAWS} draws of one model: {np.mean(draws):.4f}")
    return "\n".join(lines)


def main() -> None:
    """Makes the runs that are missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    allocator.give_back()
    stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else circumstances() | {"runs": {}}
    for seed in range(arguments.seeds):
        if str(seed) not in stored["runs"]:
            stored["runs"][str(seed)] = run(seed)
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    print(table(stored["runs"]))


if __name__ == "__main__":
    main()
