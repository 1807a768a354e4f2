"""HydraLoRA: one A for all experts, softmax gates over their Bs.

Command:  python scripts/train.py --config=configs/lora/hydralora.py --init-from=PATH --workdir=runs/hydralora
Cost:     500 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/hydralora.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests), "cpu" (docs/adapters.md, compared)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "held_in_loss",
    "lower",
    baseline="lora",
    says="one A that all share, and a B for each expert, does better than one LoRA of as many parameters",
    source="arXiv 2404.19245",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/lora:{arg}", {"model": {"adapters": TINY if arg == "tiny" else FULL}}))


FULL = {"name": "hydralora", "num_experts": 4, "r": 8, "lora_alpha": 16.0}
TINY = {"name": "hydralora", "num_experts": 4, "r": 2, "lora_alpha": 4.0}
