"""PALBERT on pointers to follow: an encoder of 8 shared layers that each example leaves when it has thought enough.

Command:  python scripts/train.py --config=configs/encoder/palbert.py --workdir=runs/palbert
          PonderNet's loss: --config.train.objective.direction=exit_to_prior --config.model.tail=last
              --config.model.lambda_layers=1 --config.model.lambda_input=last
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
    "model": {"name": "ponder", "vocab_size": 20, "seq_len": 13, "num_classes": 10},
    "data": {"name": "labelled", "source": {"name": "pointers"}, "batch_size": 128, "eval_batch_size": 512},
    "optim": {"name": "muon", "learning_rate": 1e-2, "warmup_steps": 50},
    "train": {"objective": {"name": "ponder", "beta": 0.1}, "steps": 3000},
    "checkpoint": {"every": 1000},
    "log": {"every": 20, "eval_every": 500, "eval_rows": 2048},
}

TINY = overlay(
    FULL,
    {
        "model": {
            "vocab_size": 8, "seq_len": 7, "num_classes": 4, "hidden_size": 16, "num_attention_heads": 2,
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
            "intermediate_size": 3072, "num_hidden_layers": 12,
        },
        "optim": {"name": "adamw", "learning_rate": 1e-5},
        "train": {"objective": {"beta": 0.5}},
    },
)  # fmt: skip

PRESETS = {"": FULL, "tiny": TINY, "paper": PAPER}
