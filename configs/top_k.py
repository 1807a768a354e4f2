"""Plain top-k, the quickstart's router: what every other router is compared with.

Command:  python scripts/train.py --config=configs/top_k.py --workdir=runs/top_k
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/top_k.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "test_bits_per_byte",
    "lower",
    baseline="dense",
    says="at equal compute per token, more parameters in sparsely used experts give a better model",
    source="arXiv 1701.06538",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", {}))
