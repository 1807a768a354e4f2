"""MHR: Poly with weights for each of four heads.

Command:  python scripts/train.py --config=configs/lora/mhr.py --init-from=PATH --workdir=runs/mhr
Cost:     500 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/poly.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests), "cpu" (docs/adapters.md, compared)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "held_in_loss",
    "lower",
    baseline="poly",
    says="weights of their own for parts of the dimensions mix skills better than one weight for a whole skill",
    source="arXiv 2211.03831",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/poly:{arg}", {"model": {"adapters": {"num_splits": 4}}}))
