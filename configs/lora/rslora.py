"""rsLoRA: LoRA whose scale is alpha / sqrt(r), so that a high rank keeps its size.

Command:  python scripts/train.py --config=configs/lora/rslora.py --init-from=PATH --workdir=runs/rslora
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
    says="dividing alpha by the root of the rank instead of by the rank lets higher ranks learn what they can",
    source="arXiv 2312.03732",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/lora:{arg}", {"model": {"adapters": ADAPTERS}}))


ADAPTERS = {"name": "lora", "use_rslora": True}
