"""Switch routing on the quickstart's data and size: top-1, raw probability as gate, jitter, capacity 1.25 with drops.

Command:  python scripts/train.py --config=configs/switch.py --workdir=runs/switch
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/switch.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "test_bits_per_byte",
    "lower",
    baseline="dense",
    says="one expert per token is enough to beat a dense model of the same compute per token",
    source="arXiv 2101.03961",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", CHANGES))


CHANGES = {
    "model": {
        "router": {"name": "switch", "jitter": 0.01},
        "dispatch": {"name": "capacity", "capacity_factor": 1.25, "eval_capacity_factor": 2.0},
        "losses": {"load_balance": {"coef": 0.01}},
    },
}
