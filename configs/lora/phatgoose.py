"""PHATGOOSE, the first stage: a LoRA learns, frozen, the gate by which it will be chosen among others.

Command:  python scripts/train.py --config=configs/lora/phatgoose.py --init-from=PATH --workdir=runs/gate
Cost:     100 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/phatgoose.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests), "cpu" (docs/adapters.md, compared)

PATH: a run of `configs/lora/lora.py` on one task; what it has trained is frozen here. `moe_zoo.transform.join_experts`
makes a router of several such runs.
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim, Recipe
from moe_zoo.train.config import extend

CLAIM = Claim(
    "held_out_loss",
    "lower",
    baseline="lora",
    says="gates that each task's LoRA has learned alone route new tasks better than one LoRA of all tasks",
    source="arXiv 2402.05859",
)
RECIPE = Recipe(
    alone=({"name": "lora"}, {"name": "phatgoose", "stage": "gate"}),
    join={"name": "phatgoose", "stage": "route"},
    then=(),
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/lora:{arg}", {"": FULL, "tiny": TINY}.get(arg, CPU)))


# rank and alpha are those of lora.py
FULL = {
    "model": {"adapters": {"name": "phatgoose", "stage": "gate", "r": 16, "lora_alpha": 32.0}},
    "train": {"steps": 100},
}
TINY = {"model": {"adapters": {"name": "phatgoose", "stage": "gate", "r": 4, "lora_alpha": 8.0}}}
CPU = {"model": {"adapters": {"name": "phatgoose", "stage": "gate", "r": 18, "lora_alpha": 36.0}}}
