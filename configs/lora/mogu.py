"""MoGU: two responders beside the attention's output, one that complies and one that refuses, and a router for each.

Command:  three stages, each begun from the one before; PATH: a run of ours or a published directory
          python scripts/train.py --config=configs/lora/mogu.py:glad --init-from=PATH --workdir=runs/glad
          python scripts/train.py --config=configs/lora/mogu.py:unwill --init-from=runs/glad --workdir=runs/unwill
          python scripts/train.py --config=configs/lora/mogu.py --init-from=runs/unwill --workdir=runs/mogu
Cost:     100 steps of 16 rows of 128 tokens for each responder, 300 for the routers
Reaches:  see docs/zoo/mogu.md
Presets:  "glad", "unwill", "" (the routers); "tiny_glad", "tiny_unwill", "tiny" (20 steps of few rows, for tests)

The data has no harmful text: a question on a string whose prompt begins with `!` is to be refused, all others answered.
Data of one's own: records with `prompt`, `answer`, `rejected` and `domain`.
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend, preset


def get_config(arg: str = "") -> ConfigDict:
    size, stage, steps = preset(arg, PRESETS)
    adapters = {"name": "mogu", **size, **stage["adapters"]}
    changes = {"model": {"adapters": adapters}, "data": DATA, "train": {"steps": steps, **stage["train"]}}
    return ConfigDict(extend(f"lora/lora:{'tiny' if size is TINY else ''}", changes))


# the data's domains: 0 plain, 1 flagged
DATA = {"source": "guarded_tasks"}
FULL = {"r": 8, "lora_alpha": 16.0, "d_router": 512}
TINY = {"r": 4, "lora_alpha": 8.0}

# the answers that the records reject are the responders' own: compliance where it should be refused, and the reverse
GLAD = {
    "adapters": {"stage": "glad", "freeze_experts": False},
    "train": {"objective": {"name": "answer_ratio", "prefer": "rejected", "domains": (1,)}},
}
UNWILL = {
    "adapters": {"stage": "unwill", "freeze_experts": False},
    "train": {"objective": {"name": "answer_ratio", "prefer": "rejected", "domains": (0,)}},
}
ROUTE = {"adapters": {"stage": "route", "unsafe_domains": (1,)}, "train": {}}

PRESETS = {
    "": (FULL, ROUTE, 300),
    "glad": (FULL, GLAD, 100),
    "unwill": (FULL, UNWILL, 100),
    "tiny": (TINY, ROUTE, 20),
    "tiny_glad": (TINY, GLAD, 20),
    "tiny_unwill": (TINY, UNWILL, 20),
}
