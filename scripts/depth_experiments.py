"""What routers of depth do to a trained model that stays as it is: Dr.LLM and FiRST on questions of addition.

    python scripts/depth_experiments.py base        the models: a decoder of eight layers for each seed
    python scripts/depth_experiments.py dr_llm      whole layers skipped or repeated, by labels that a search has found
    python scripts/depth_experiments.py first       layers skipped, by gates that the loss has taught

Models lie in --workdir and are trained once. What is printed is the table of the cards in docs/zoo.
"""

from moe_zoo.cli import allocator

if __name__ == "__main__":
    allocator.use()

import argparse
import json
from pathlib import Path

import numpy as np

from moe_zoo.train import loop
from moe_zoo.train.config import Config, config_from_dict

#: of a question, both numbers having as many digits; so many questions of each
DIGITS, COUNT = (1, 2, 3), 12_000
STEPS = 2000
MODEL = {
    "hidden_size": 64, "layers": "8*dense", "intermediate_size": 128, "attention": {"num_attention_heads": 4},
    "norm": "rms", "losses": {},
}  # fmt: skip


def write_questions(path: Path) -> None:
    """Records "417+86=" -> "305": the sum's digits from the last one on, which is the order that they are found in."""
    random, lines = np.random.RandomState(0), []
    for k in DIGITS:
        numbers = np.arange(100 if k == 1 else 10 ** (2 * k)) if k < 3 else random.randint(0, 10**6, 2 * COUNT)
        for number in random.permutation(np.unique(numbers))[:COUNT].tolist():
            a, b = divmod(number, 10**k)
            lines.append({"prompt": f"{a}+{b}=", "answer": str(a + b)[::-1], "domain": f"{k} digits"})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def base_config(data: Path, seed: int) -> Config:
    """Of a model of that seed."""
    return config_from_dict({
        "model": MODEL,
        "data": {"source": str(data), "seq_len": 96, "batch_size": 32, "eval_batch_size": 64},
        "optim": {"learning_rate": 3e-3, "schedule": "wsd", "warmup_steps": 50, "weight_decay": 0.01, "b2": 0.99},
        "train": {"steps": STEPS, "seed": seed},
        "checkpoint": {"every": 1000},
        "log": {"every": 100, "eval_every": 500, "tensorboard": False},
    })  # fmt: skip


def train_base(workdir: Path, seed: int) -> None:
    """Trains the model of that seed, or goes on with it."""
    data = workdir / "questions.jsonl"
    if not data.is_file():
        write_questions(data)
    loop.train(base_config(data, seed), workdir / f"base-{seed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("base", "dr_llm", "first"))
    parser.add_argument("--workdir", type=Path, default=Path("runs/depth_experiments"))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    for seed in range(args.seeds):
        train_base(args.workdir, seed)


if __name__ == "__main__":
    main()
