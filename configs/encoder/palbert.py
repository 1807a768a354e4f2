"""PALBERT on pointers to follow: an encoder of 6 shared layers that each example leaves when it has thought enough.

Command:  python scripts/train.py --config=configs/encoder/palbert.py --workdir=runs/palbert
          PonderNet's loss: --config.train.objective.direction=exit_to_prior
              --config.model.lambda_layers=1 --config.model.lambda_input=last
          the released probabilities, which need not add up to 1: --config.model.tail=released
          a block per layer: --config.model.share_layers=false
Cost:     see docs/zoo/palbert.md
Reaches:  see docs/zoo/palbert.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "paper" (ALBERT's size: a configuration only)
"""

from ml_collections import ConfigDict

from moe_zoo.core.schema import overlay
from moe_zoo.train.config import preset


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(preset(arg, PRESETS))


FULL = {
    "model": {
        "name": "ponder", "vocab_size": 61, "seq_len": 7, "num_classes": 6, "num_hidden_layers": 6, "tail": "last",
        "intermediate_size": 128,
    },
    "data": {"name": "labelled", "source": {"name": "pointers"}, "batch_size": 128, "eval_batch_size": 512},
    "optim": {"name": "muon", "learning_rate": 1e-2, "warmup_steps": 50},
    "train": {"objective": {"name": "ponder", "beta": 0.05, "prior": 0.2}, "steps": 500},
    "checkpoint": {"every": 250},
    "log": {"every": 20, "eval_every": 100, "eval_rows": 2048},
}  # fmt: skip

TINY = overlay(
    FULL,
    {
        "model": {
            "vocab_size": 25, "seq_len": 5, "num_classes": 4, "hidden_size": 16, "num_attention_heads": 2,
            "intermediate_size": 32, "num_hidden_layers": 3,
        },
        "data": {"source": {"name": "pointers", "places": 4, "most": 2, "examples": 2048}, "batch_size": 32},
        "optim": {"warmup_steps": 2},
        "train": {"steps": 20},
        "checkpoint": {"every": 10},
        "log": {"every": 5, "eval_every": 10, "eval_rows": 64, "tensorboard": False},
    },
)  # fmt: skip

# ALBERT-base with the README's beta, of sentences that no data here has
PAPER = overlay(
    FULL,
    {
        "model": {
            "vocab_size": 30_000, "seq_len": 128, "num_classes": 2, "hidden_size": 768, "num_attention_heads": 12,
            "intermediate_size": 3072, "num_hidden_layers": 12, "tail": "released",
        },
        "optim": {"name": "adamw", "learning_rate": 1e-5},
        "train": {"objective": {"beta": 0.5, "prior": 0.1}},
    },
)  # fmt: skip

PRESETS = {"": FULL, "tiny": TINY, "paper": PAPER}
