"""Which attention finds what it has seen long ago: the Routing Transformer beside local, random and full attention.

    python scripts/attention_experiments.py [--seeds=3] [--only="full;local"]

Associative recall: 32 statements, each a token that names a key and one of 8 values, 192 tokens of filler, then the
keys in another order, each to be answered with its value. Windows are of 32 tokens, so that two layers of them reach 62
back, and the nearest statement is more than 192 away. Runs go to docs/results/attention/recall.json, where they are
counted as done; what is printed is the table of the card: accuracy token by token, and as in training, where clusters
may have seen the future.
"""

from moe_zoo.cli import allocator

if __name__ == "__main__":
    allocator.use()

import argparse
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_zoo.compare.runner import circumstances
from moe_zoo.core import param as P
from moe_zoo.models import Decoder
from moe_zoo.sharding import make_mesh
from moe_zoo.train.config import Config, config_from_dict
from moe_zoo.train.step import Trainer

RESULTS = Path("docs/results/attention/recall.json")
#: keys, values, tokens of filler between statements and questions, and how many different ones of these there are
KEYS, VALUES, FILLER, FILLERS = 32, 8, 192, 16
S = 2 * KEYS + FILLER
WINDOW, CLUSTERS = 32, S // 32
STEPS, BATCH, TESTS = 500, 16, 256

_ROUTED = {
    "name": "routed_attention", "local_window": WINDOW, "num_clusters": CLUSTERS, "window": WINDOW, "decay": 0.99,
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "local": {"attention": {"num_attention_heads": 4, "sliding_window": WINDOW}},
    "local + routing": {"mixer": _ROUTED},
    "local + routing, token_argmax": {"mixer": _ROUTED | {"assignment": "token_argmax"}},
    "local + random clusters": {"mixer": _ROUTED | {"clusters": "random"}},
    "full": {},
}


def configured(arm: str) -> Config:
    """Two layers of width 64."""
    model = {
        "vocab_size": KEYS * (VALUES + 1) + VALUES + FILLERS, "hidden_size": 64, "layers": "2*dense",
        "intermediate_size": 128, "attention": {"num_attention_heads": 4},
    }  # fmt: skip
    return config_from_dict({
        "model": model | ARMS[arm], "data": {"seq_len": S, "batch_size": BATCH},
        "optim": {"name": "muon", "learning_rate": 1e-2, "schedule": "cosine", "warmup_steps": 50},
        "train": {"steps": STEPS},
    })  # fmt: skip


def recall(random: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    """A batch of sequences of ids: values, questions, statements, filler, in this order."""
    tokens, targets = np.empty((rows, S), np.int32), np.zeros((rows, S), np.int32)
    ask, state = VALUES, VALUES + KEYS
    for row, target in zip(tokens, targets, strict=True):
        values = random.integers(0, VALUES, KEYS)
        stated, asked = random.permutation(KEYS), random.permutation(KEYS)
        filler = state + KEYS * VALUES + random.integers(0, FILLERS, FILLER)
        row[:] = np.concatenate([state + stated * VALUES + values[stated], filler, ask + asked])
        target[-KEYS:] = values[asked]
    place = np.tile(np.arange(S, dtype=np.int32), (rows, 1))
    return {
        "tokens": tokens, "targets": targets, "positions": place, "segment_ids": np.ones_like(place),
        "domain": np.zeros_like(place), "loss_mask": place >= S - KEYS,
    }  # fmt: skip


def attention_flops(arm: str) -> float:
    """Forward FLOPs of a token in attention without projections: scores and mixing, and distances to means."""
    block = Decoder(configured(arm).model).segments[0].blocks[0]
    weights = [var for name, var in P.flat(block.mixer).items() if not isinstance(var, P.Buffer)]
    projections = 2 * sum(math.prod(var.get_value().shape[1:]) for var in weights)
    return float(2 * (block.mixer.flops_per_token((S + 1) / 2) - projections))


class Arm:
    """One kind of attention: a program that trains, one that asks."""

    def __init__(self, name: str):
        self.name, config = name, configured(name)
        self.trainer = Trainer(config, make_mesh(devices=jax.devices()[:1]), config.train.objective.make())
        self.ask = jax.jit(_ask)

    def run(self, seed: int) -> dict[str, float]:
        """Trains one model and asks it."""
        trainer, random = self.trainer, np.random.default_rng([seed, 0])
        state = trainer.init_state(given=P.arrays(P.materialize(trainer.abstract, seed)))
        for step in range(STEPS):
            state, stats = trainer.train_step(state, recall(random, BATCH), np.float32(step / STEPS))
            if step % 100 == 99:
                print(f"  {self.name}, step {step + 1}: loss {float(stats['scalars']['loss']):.3f}", flush=True)
        random, model = np.random.default_rng([seed, 1]), trainer.model(state)
        test = [recall(random, BATCH) for _ in range(TESTS // BATCH)]
        found = {}
        for kind, asked in (("", model), ("as_trained_", model.as_trained())):
            each = np.mean([jax.device_get(self.ask(asked, batch)) for batch in test], axis=0)
            found |= {f"{kind}accuracy": float(each[0]), f"{kind}loss": float(each[1])}
        return found | {"attention_flops": attention_flops(self.name)}


def _ask(model, batch):
    """(share of answers that are right, their loss in nats)."""
    logits, targets = model(batch["tokens"])[0][:, -KEYS:], batch["targets"][:, -KEYS:]
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
    return jnp.stack([(logits.argmax(-1) == targets).mean(), nats.mean()])


COLUMNS = ("accuracy", "as_trained_accuracy", "loss", "as_trained_loss", "attention_flops")


def table(runs: dict[str, dict[str, dict[str, float]]]) -> Iterator[str]:
    """Means over seeds and, behind +-, the standard deviation."""
    yield "| | " + " | ".join(COLUMNS) + " | seeds |"
    yield "|---" * (2 + len(COLUMNS)) + "|"
    for arm in (arm for arm in ARMS if runs.get(arm)):
        cells = [_cell(name, [found[name] for found in runs[arm].values()]) for name in COLUMNS]
        yield f"| {arm} | {' | '.join(cells)} | {len(runs[arm])} |"


def _cell(name: str, values: list[float]) -> str:
    if name == "attention_flops":
        return f"{values[0]:,.0f}"
    return f"{np.mean(values):.3f}" + (f" +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def main() -> None:
    """Makes the runs that are missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default=";".join(ARMS), help="some of %(default)r")
    arguments = parser.parse_args()
    allocator.give_back()
    stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else circumstances() | {"steps": STEPS, "runs": {}}
    arms = {name: functools.cache(functools.partial(Arm, name)) for name in arguments.only.split(";")}
    for seed in range(arguments.seeds):
        for name, arm in arms.items():
            if str(seed) in stored["runs"].setdefault(name, {}):
                continue
            found = stored["runs"][name][str(seed)] = arm().run(seed)
            print(f"seed {seed}, {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()), flush=True)
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    print("\n".join(table(stored["runs"])))


if __name__ == "__main__":
    main()
