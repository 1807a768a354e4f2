"""SMoRA: 8 of a LoRA's 32 ranks for each token, balanced by a bias.

Command:  python scripts/train.py --config=configs/lora/smora.py --init-from=PATH --workdir=runs/smora
Cost:     500 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/smora.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests)
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/lora:{arg}", {"model": {"adapters": ADAPTERS}}))


ADAPTERS = {
    "name": "smora",
    "r": 32,
    "num_experts_per_tok": 8,
    "lora_alpha": 16.0,
    "bias_update_rate": 0.001,
}
