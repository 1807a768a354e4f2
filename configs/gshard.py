"""GShard on the quickstart's data and size: top-2, a weak second expert skipped at random, capacity 2 T / E per row.

Command:  python scripts/train.py --config=configs/gshard.py --workdir=runs/gshard
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/gshard.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "test_bits_per_byte",
    "lower",
    baseline="dense",
    says="top-2 experts with a random second one beat a dense model of the same compute per token",
    source="arXiv 2006.16668",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", CHANGES))


CHANGES = {
    "model": {
        "router": {"name": "gshard"},
        # C = ceil(factor * 2 * S / E): the paper's 2 S / E
        "dispatch": {"name": "capacity", "capacity_factor": 1.0, "group": "sequence"},
        "losses": {"load_balance": {"coef": 0.01, "choices": "first"}},
    },
}
