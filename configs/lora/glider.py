"""GLIDER, the first stage, which is PHATGOOSE's: a LoRA learns, frozen, the gate by which its tokens are known.

Command:  python scripts/train.py --config=configs/lora/glider.py --init-from=PATH --workdir=runs/gate
Cost:     100 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/glider.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests), "cpu" (docs/adapters.md, compared)

PATH: a run of `configs/lora/lora.py` on one task; what it has trained is frozen here. `moe_zoo.transform.join_experts`
makes one model of several such runs, `describe_experts` tells it what each is for; then nothing trains any more.
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim, Recipe
from moe_zoo.train.config import extend

CLAIM = Claim(
    "held_in_loss",
    "lower",
    baseline="phatgoose",
    says="told what is asked for, the same experts are chosen better than by their tokens alone",
    source="arXiv 2410.07172",
)
RECIPE = Recipe(
    alone=({"name": "lora"}, {"name": "glider", "stage": "gate", "num_experts": 1}),
    join={"name": "glider", "stage": "route"},
    then=(),
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/lora:{arg}", {"": FULL, "tiny": TINY}.get(arg, CPU)))


# rank and alpha are those of lora.py
ADAPTERS = {"name": "glider", "stage": "gate", "num_experts": 1}
FULL = {"model": {"adapters": ADAPTERS | {"r": 16, "lora_alpha": 32.0}}, "train": {"steps": 100}}
TINY = {"model": {"adapters": ADAPTERS | {"r": 4, "lora_alpha": 8.0}}}
CPU = {"model": {"adapters": ADAPTERS | {"r": 18, "lora_alpha": 36.0}}}
