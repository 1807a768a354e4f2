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
        "image_size": 64,
        "channels": 1,
        "depths": [1, 2, 1],
        "hidden_sizes": [32, 64, 128],
        "num_heads": [1, 2, 4],
        "topk": [1, 4, -2],
        "windows": 4,
    },
    "data": {
        "name": "labelled",
        "source": {"name": "cluttered_digits", "canvas": 64, "smallest": 16, "largest": 40, "copies": 2},
        "batch_size": 32,
        "eval_batch_size": 128,
    },
    "optim": {"learning_rate": 1e-3, "warmup_steps": 20, "weight_decay": 0.05},
    "train": {"objective": {"name": "classification", "label_smoothing": 0.1}, "steps": 400},
    "checkpoint": {"every": 200},
    "log": {"every": 10, "eval_every": 100, "eval_rows": 256},
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
