"""MoLE: a gate over the outputs of LoRAs.

Command:  python scripts/train.py --config=configs/lora/mole.py --init-from=PATH --workdir=runs/mole
Cost:     500 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/mole.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests), "cpu" (docs/adapters.md, compared)

The paper's experts are LoRAs that were trained before (`moe_zoo.transform.load_adapters`); here they train with the
gate, since none are given.
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "held_in_loss",
    "lower",
    baseline="lora",
    says="a learned gate over the outputs of several LoRAs keeps what each of them can, which one LoRA cannot",
    source="arXiv 2404.13628",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/lora:{arg}", {"model": {"adapters": ADAPTERS}}))


ADAPTERS = {
    "name": "mole",
    "num_experts": 4,
    "r": 4,
    "lora_alpha": 8.0,
    "freeze_experts": False,
}
