"""Arrow: what it routes among, a LoRA for one task; the routing itself is not trained.

Command:  python scripts/train.py --config=configs/lora/arrow.py --init-from=PATH --workdir=runs/reverse
          --config.data.source=tasks:reverse
Cost:     500 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/arrow.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests), "cpu" (docs/adapters.md, compared)

`moe_zoo.transform.join_experts(base, runs, "arrow")` makes a router of several such runs.
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim, Recipe
from moe_zoo.train.config import extend

CLAIM = Claim(
    "held_out_loss",
    "lower",
    baseline="lora",
    says="a library of LoRAs, one for each task, routed without training, does better on new tasks than one for all",
    source="arXiv 2405.11157",
)
RECIPE = Recipe(alone=({"name": "lora"},), join={"name": "arrow"}, then=())


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/lora:{arg}", {}))
