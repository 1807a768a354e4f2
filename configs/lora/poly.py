"""Poly: fourteen tasks mix the parameters of four skills.

Command:  python scripts/train.py --config=configs/lora/poly.py --init-from=PATH --workdir=runs/poly
Cost:     500 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/poly.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests), "cpu" (docs/adapters.md, compared)

MHR, head by head: configs/lora/mhr.py.
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "held_in_loss",
    "lower",
    baseline="lora",
    says="skills that every task mixes in proportions of its own do better than one LoRA that all tasks share",
    source="arXiv 2202.13914",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(
        extend(f"lora/lora:{arg}", {"model": {"adapters": ADAPTERS}, "optim": {"lr_scales": ["*.logits=100"]}})
    )


ADAPTERS = {
    "name": "poly",
    "num_tasks": 14,
    "num_skills": 4,
    "r": 4,
    "lora_alpha": 4.0,
}
