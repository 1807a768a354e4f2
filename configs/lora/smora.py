"""SMoRA: 8 of a LoRA's 32 ranks for each token, balanced by a bias.

Command:  python scripts/train.py --config=configs/lora/smora.py --init-from=PATH --workdir=runs/smora
Cost:     500 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/smora.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests), "cpu" (docs/adapters.md, compared)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "held_in_loss",
    "lower",
    baseline="lora",
    says="single ranks as experts, few of them for a token, do better on many tasks than a LoRA of all ranks",
    source="arXiv 2501.15103",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/lora:{arg}", {"model": {"adapters": ADAPTERS | (CPU if arg == "cpu" else {})}}))


ADAPTERS = {
    "name": "smora",
    "r": 32,
    "num_experts_per_tok": 8,
    "lora_alpha": 16.0,
    "bias_update_rate": 0.001,
}
CPU = {"num_experts_per_tok": 4, "lora_alpha": 8.0}
