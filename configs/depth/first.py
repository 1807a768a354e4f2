"""FiRST on any model that can be loaded: gates learn which layers a question can do without, the model stays as it is.

Command:  python scripts/train.py --config=configs/depth/first.py --init-from=PATH --workdir=runs/first
          the second phase, LoRA beside it: python scripts/train.py --config=configs/lora/lora.py --init-from=runs/first
          --workdir=runs/first_lora
          PATH: a run of ours or a published directory
Cost:     500 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/first.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests)

`--config.model.depth.alpha=0.05` skips more. Questions with their answers are what it is for (`data.source`, as for the
adapters): what comes before the answer decides.
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/lora:{arg}", CHANGES))


CHANGES = {
    "model": {"adapters": {"name": "none"}, "depth": {"name": "first"}},
    "optim": {"learning_rate": 1e-2},
}
