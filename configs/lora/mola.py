"""MoLA: the two best of a layer's experts, more experts in the upper layers.

Command:  python scripts/train.py --config=configs/lora/mola.py --init-from=PATH --workdir=runs/mola
Cost:     500 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/mola.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests), "cpu" (docs/adapters.md, compared)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "held_in_loss",
    "lower",
    baseline="lora",
    says="top-2 of a layer's LoRAs, with more of them in the upper layers, does better than one LoRA",
    source="arXiv 2402.08562",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/lora:{arg}", {"model": {"adapters": TINY if arg == "tiny" else FULL}}))


FULL = {"name": "mola", "r": 4, "lora_alpha": 8.0, "experts_by_depth": [2, 4]}
TINY = {"name": "mola", "experts_by_depth": [2, 4], "r": 2, "lora_alpha": 4.0}
