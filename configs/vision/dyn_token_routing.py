"""A small DynTokenRoutingViT on handwritten digits that lie somewhere, at some scale, on a photograph: tokens choose
their depth and scale, at half of the FLOPs of all.

Command:  python scripts/train.py --config=configs/vision/dyn_token_routing.py --workdir=runs/token_routing
          a quarter of the FLOPs: --config.train.objective.share=0.25
          the ancestor's gates: --config.model.gate.kind=tanh
          every gate open: --config.model.gate.kind=open
Cost:     see docs/zoo/dit_token_routing.md
Reaches:  see docs/zoo/dit_token_routing.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests)
"""

from ml_collections import ConfigDict

from moe_zoo.core.schema import overlay
from moe_zoo.train.config import preset


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(preset(arg, PRESETS))


FULL = {
    "model": {
        "name": "dyn_token_routing_vit",
        "image_size": 32,
        "hidden_sizes": [32, 32, 32],
        "num_heads": [2, 2, 2],
        "stages": 4,
    },
    "data": {
        "name": "labelled",
        "source": {"name": "cluttered_digits", "canvas": 32, "smallest": 12, "largest": 24, "clutter": 0.4},
        "batch_size": 32,
        "eval_batch_size": 256,
    },
    "optim": {"name": "muon", "learning_rate": 8e-3, "warmup_steps": 50},
    "train": {
        "objective": {"name": "token_budget", "share": 0.5, "delay_steps": 120, "warmup_steps": 60},
        "steps": 300,
    },
    "checkpoint": {"every": 300},
    "log": {"every": 20, "eval_every": 150, "eval_rows": 512},
}

TINY = overlay(
    FULL,
    {
        "model": {
            "image_size": 8,
            "hidden_sizes": [8, 8],
            "num_heads": [2, 2],
            "stages": 2,
            "gate": {"hidden_size": 4},
        },
        "data": {"source": {"name": "digits"}, "batch_size": 16, "eval_batch_size": 64},
        "optim": {"warmup_steps": 5},
        "train": {"objective": {"delay_steps": 4, "warmup_steps": 8}, "steps": 20},
        "checkpoint": {"every": 10},
        "log": {"every": 5, "eval_every": 10, "eval_rows": 64, "tensorboard": False},
    },
)

PRESETS = {"": FULL, "tiny": TINY}
