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
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_zoo.compare.runner import circumstances
from moe_zoo.core import param as P
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


@functools.cache
def prepared(name: str):
    """(program that trains, examples to train with, others)."""
    config = config_from_dict(overlay(load_config("configs/encoder/palbert.py").to_dict(), MODELS[name]))
    data = config.data.source.make().load()
    config.model.check_examples(data)
    trainer = Trainer(config, make_mesh(devices=jax.devices()[:1]), config.train.objective.make())
    first = len(data) - TESTS
    return trainer, data.select(np.arange(first)), data.select(np.arange(first, len(data)))


def trained(name: str, seed: int) -> tuple[Ponder, Any]:
    """(model, examples that it has not seen)."""
    trainer, seen, test = prepared(name)
    config, random = trainer.config, np.random.default_rng(seed)
    state = trainer.init_state(given=P.arrays(P.materialize(trainer.abstract, seed)))
    for step in range(config.train.steps):
        rows = random.integers(0, len(seen), config.data.batch_size)
        state, stats = trainer.train_step(state, seen.rows(rows), np.float32(step / config.train.steps))
        if step % 100 == 99:
            told = {k: round(float(stats["scalars"][k]), 3) for k in ("loss", "accuracy", "depth")}
            print(f"  {name}, seed {seed}, step {step + 1}: {told}", flush=True)
    return trainer.model(state), test


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a model says of test examples behind every layer: lambda and guesses [L, B], probabilities [L, B, C]."""

    halt: np.ndarray
    guess: np.ndarray
    probs: np.ndarray
    labels: np.ndarray
    steps: np.ndarray

    @classmethod
    def of(cls, model: Ponder, test) -> "Seen":
        tokens = test.fields["tokens"]
        halt, logits = jax.device_get(jax.jit(lambda model: model.all_layers(tokens))(model))
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        return cls(halt, logits.argmax(-1), probs, test.labels, PointersConfig().steps(tokens))

    def left(self, leaves: np.ndarray) -> dict[str, float]:
        """{"accuracy", "layers" on average, "correlation" of layers with steps}; `leaves` [L, B]: where one would."""
        at = np.where(leaves.any(0), leaves.argmax(0), len(leaves) - 1)
        together = float(np.corrcoef(at, self.steps)[0, 1]) if at.std() else 0.0
        return {"layers": float(at.mean() + 1), "correlation": together} | self._right(
            self.guess[at, np.arange(len(at))]
        )

    def quantile(self, q: float) -> dict[str, float]:
        return self.left(1 - np.cumprod(1 - self.halt, 0) > q)

    def drawn(self, seed: int) -> dict[str, float]:
        return self.left(np.random.default_rng(seed).random(self.halt.shape) < self.halt)

    def fixed(self, depth: int) -> dict[str, float]:
        return self.left(np.broadcast_to(np.arange(1, len(self.halt) + 1)[:, None] == depth, self.halt.shape))

    def patience(self, patience: int) -> dict[str, float]:
        agreed = np.zeros(self.halt.shape, int)
        for layer in range(1, len(agreed)):
            agreed[layer] = np.where(self.guess[layer] == self.guess[layer - 1], agreed[layer - 1] + 1, 0)
        return self.left(agreed >= patience)

    def mixed(self) -> dict[str, float]:
        alive = np.cumprod(np.concatenate([np.ones_like(self.halt[:1]), 1 - self.halt[:-1]]), 0)
        p = np.concatenate([(self.halt * alive)[:-1], alive[-1:]])
        guess = np.einsum("lb,lbc->bc", p, self.probs).argmax(-1)
        return {"layers": float(len(p)), "correlation": 0.0} | self._right(guess)

    def _right(self, guess) -> dict[str, float]:
        right = guess == self.labels
        by_steps = {f"accuracy_{k}": float(right[self.steps == k].mean()) for k in np.unique(self.steps)}
        return {"accuracy": float(right.mean())} | by_steps


def run(seed: int) -> dict[str, list[dict[str, float]]]:
    """What every rule makes of the models of a seed."""
    seen = Seen.of(*trained("palbert", seed))
    depths = range(1, len(seen.halt) + 1)
    found = {
        "quantile": [seen.quantile(q) for q in QUANTILES],
        "sample": [seen.drawn(draw) for draw in range(DRAWS)],
        "expectation": [seen.mixed()],
        "its own layers": [seen.fixed(depth) for depth in depths],
    }
    seen = Seen.of(*trained("pabee", seed))
    found["patience"] = [seen.patience(patience) for patience in depths[:-1]]
    found["fixed"] = [seen.fixed(depth) for depth in depths]
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
                spread = f" +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
                cells.append(f"{np.mean(values):.3f}{spread}")
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
