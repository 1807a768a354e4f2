"""DoRA: LoRA with the length of every column of the updated weight trained apart from its direction.

Command:  python scripts/train.py --config=configs/lora/dora.py --init-from=PATH --workdir=runs/dora
Cost:     500 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/lora.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests), "cpu" (docs/adapters.md, compared)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "held_in_loss",
    "lower",
    baseline="lora",
    says="training the length of the weight's columns apart from their direction learns more at the same rank",
    source="arXiv 2402.09353",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/lora:{arg}", {"model": {"adapters": ADAPTERS}}))


ADAPTERS = {"name": "lora", "use_dora": True}
