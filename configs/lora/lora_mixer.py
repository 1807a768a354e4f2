"""LoRA-Mixer, first stage: an expert for each of fourteen tasks, trained by their labels.

Command:  python scripts/train.py --config=configs/lora/lora_mixer.py --init-from=PATH --workdir=runs/lora_mixer
Cost:     500 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/lora_mixer.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests), "cpu" (docs/adapters.md, compared)

The second stage goes on from it: `--init-from` this run, `--config.model.adapters.routing=soft` and
`--config.model.adapters.freeze_experts=true`.
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim, Recipe
from moe_zoo.train.config import extend

CLAIM = Claim(
    "held_in_loss",
    "lower",
    baseline="lora",
    says="an expert trained for each task, then a router over them with an entropy term, does better than one LoRA",
    source="arXiv 2507.00029",
)
# the paper's two stages: experts by the tasks' labels, then the router over them
RECIPE = Recipe(then=({"routing": "task"}, {"routing": "soft", "freeze_experts": True}))


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/lora:{arg}", {"model": {"adapters": ADAPTERS | (CPU if arg == "cpu" else {})}}))


ADAPTERS = {
    "name": "lora_mixer",
    "num_experts": 14,
    "r": 4,
    "lora_alpha": 8.0,
    "routing": "task",
}
CPU = {"num_experts": 8}
