"""X-LoRA: a first pass through the base decides how the second mixes LoRAs.

Command:  python scripts/train.py --config=configs/lora/xlora.py --init-from=PATH --workdir=runs/xlora
Cost:     500 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/xlora.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests), "cpu" (docs/adapters.md, compared)

The paper's experts are LoRAs that were trained before (`moe_zoo.transform.load_adapters`); here they train with the
classifier, since none are given.
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim, Recipe
from moe_zoo.train.config import extend

CLAIM = Claim(
    "held_in_loss",
    "lower",
    baseline="lora",
    says="LoRAs that stay as they are, mixed as the model's own hidden state says, do better than one LoRA",
    source="arXiv 2402.07148",
)
# as in the paper: experts are trained before, each on its task, and the classifier alone learns to mix them
RECIPE = Recipe(alone=({"name": "lora"},), join={"name": "xlora"}, then=({},))


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/lora:{arg}", {"model": {"adapters": ADAPTERS}}))


ADAPTERS = {
    "name": "xlora",
    "num_experts": 4,
    "r": 4,
    "lora_alpha": 8.0,
    "freeze_experts": False,
}
