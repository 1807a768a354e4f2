"""DynMoLE: every expert where the router is unsure, top-p and at least top-k where it is not.

Command:  python scripts/train.py --config=configs/lora/dynmole.py --init-from=PATH --workdir=runs/dynmole
Cost:     500 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/dynmole.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests), "cpu" (docs/adapters.md, compared)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "held_in_loss",
    "lower",
    baseline="mola",
    says="all experts where the router is unsure and few where it is certain does better than top-2 as in MoLA",
    source="arXiv 2504.00661",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/lora:{arg}", {"model": {"adapters": ADAPTERS}}))


ADAPTERS = {
    "name": "dynmole",
    "num_experts": 6,
    "r": 4,
    "lora_alpha": 8.0,
}
