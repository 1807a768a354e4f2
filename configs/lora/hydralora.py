"""HydraLoRA: one A for all experts, softmax gates over their Bs.

Command:  python scripts/train.py --config=configs/lora/hydralora.py --init-from=PATH --workdir=runs/hydralora
Cost:     500 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/hydralora.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests)
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/lora:{arg}", {"model": {"adapters": TINY if arg else FULL}}))


FULL = {"name": "hydralora", "num_experts": 4, "r": 8, "lora_alpha": 16.0}
TINY = {"name": "hydralora", "num_experts": 4, "r": 2, "lora_alpha": 4.0}
