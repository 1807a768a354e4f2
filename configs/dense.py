"""The dense decoder with the quickstart's active width: what every mixture is compared with.

Command:  python scripts/train.py --config=configs/dense.py --workdir=runs/dense
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/top_k.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Reference
from moe_zoo.train.config import extend

CLAIM = Reference(says="no experts: a feed-forward layer as wide as what a token of the mixture visits")


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", changes))


def changes(base: dict) -> dict:
    model = base["model"]
    active = model["router"]["num_experts_per_tok"] * model["moe_intermediate_size"]
    return {"model": {"layers": model["layers"].replace("moe", "dense"), "intermediate_size": active}}
