"""A small BiFormer on handwritten digits that lie somewhere, at some scale, on a photograph.

Command:  python scripts/train.py --config=configs/vision/biformer.py --workdir=runs/biformer
          routing in no stage: --config.model.topk="(-2, -2, -2)"
Cost:     see docs/zoo/biformer.md
Reaches:  see docs/zoo/biformer.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "paper" (BiFormer-T: a configuration only)
"""

from ml_collections import ConfigDict

from moe_zoo.core.schema import overlay
from moe_zoo.train.config import preset


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(preset(arg, PRESETS))


FULL = {
    "model": {
        "name": "biformer",
        "image_size": 32,
        "channels": 1,
        "depths": [2, 2, 1],
        "hidden_sizes": [32, 48, 64],
        "num_heads": [2, 3, 4],
        "topk": [2, 4, -2],
        "windows": 4,
    },
    "data": {
        "name": "labelled",
        "source": {"name": "cluttered_digits", "canvas": 32, "smallest": 12, "largest": 24, "clutter": 0.4},
        "batch_size": 32,
        "eval_batch_size": 256,
    },
    "optim": {"name": "muon", "learning_rate": 8e-3, "warmup_steps": 50},
    "train": {"objective": {"name": "classification"}, "steps": 300},
    "checkpoint": {"every": 300},
    "log": {"every": 20, "eval_every": 150, "eval_rows": 512},
}

TINY = overlay(
    FULL,
    {
        "model": {
            "image_size": 8, "depths": [1, 1], "hidden_sizes": [8, 16], "num_heads": [2, 2], "topk": [1, -2],
            "windows": 2,
        },
        "data": {"source": {"name": "digits"}, "batch_size": 16, "eval_batch_size": 64},
        "optim": {"warmup_steps": 5},
        "train": {"steps": 20},
        "checkpoint": {"every": 10},
        "log": {"every": 5, "eval_every": 10, "eval_rows": 64, "tensorboard": False},
    },
)  # fmt: skip

# BiFormer-T as its settings' defaults have it; of 224 x 224 pixels and 1,000 classes, which no data here has
PAPER = overlay(FULL, {"model": {"name": "biformer", "image_size": 224, "channels": 3, "num_classes": 1000}})
for _name in ("depths", "hidden_sizes", "num_heads", "topk", "windows"):
    del PAPER["model"][_name]

PRESETS = {"": FULL, "tiny": TINY, "paper": PAPER}
