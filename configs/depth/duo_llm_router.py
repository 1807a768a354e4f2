"""Duo-LLM's router on a model of its first stage: which layers' big network each token takes, under one budget.

Command:  python scripts/train.py --config=configs/depth/duo_llm_router.py --init-from=runs/duo_llm
          --config.model.router.name=duo_llm --workdir=runs/duo_llm_router
Cost:     300 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/duo_llm.md
Presets:  "" (the above), "tiny" (20 steps of few rows, from the start: seconds, for tests)

The share of big networks over all layers and tokens: `--config.train.objective.share=0.3`. Only the routers move;
`--config.train.freeze="()"` trains all. --init-from takes the settings of the model, so the router and what is not its
default are given after it: `--config.model.router.total_steps=1000`, when the mixture is hardest, for so many steps.
"""

from ml_collections import ConfigDict

from moe_zoo.core.schema import overlay
from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"duo_llm:{arg}", TINY if arg == "tiny" else FULL))


CHANGES = {
    "model": {"router": {"name": "duo_llm"}},
    "optim": {"name": "adamw", "learning_rate": 1e-2, "weight_decay": 0.0},
    "train": {"objective": {"name": "global_budget"}, "freeze": ("*", "!*.router.*")},
}
TINY = overlay(CHANGES, {"model": {"router": {"total_steps": 20}}, "train": {"freeze": ()}})
FULL = overlay(CHANGES, {"train": {"steps": 300, "minutes": None}})
