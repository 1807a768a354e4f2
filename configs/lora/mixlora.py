"""MixLoRA: the two best of whole feed-forward experts that share the frozen one; plain LoRA beside attention.

Command:  python scripts/train.py --config=configs/lora/mixlora.py --init-from=PATH --workdir=runs/mixlora
Cost:     500 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/mixlora.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests), "cpu" (docs/adapters.md, compared)

The base must have dense layers.
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "held_in_loss",
    "lower",
    baseline="lora",
    says="top-2 of whole feed-forward experts made of LoRAs does better on many tasks than one LoRA",
    source="arXiv 2404.15159",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/lora:{arg}", {"model": {"adapters": ADAPTERS}}))


ADAPTERS = {
    "name": "mixlora",
    "num_experts": 4,
    "r": 4,
    "lora_alpha": 8.0,
    "num_experts_per_tok": 2,
}
