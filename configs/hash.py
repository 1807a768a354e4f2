"""Hash layers on the quickstart's data and size: the byte says which expert, by a table that is even over the data.

Command:  python scripts/train.py --config=configs/hash.py --workdir=runs/hash
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/hash.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "test_bits_per_byte",
    "lower",
    baseline="switch",
    says="a fixed map from token to expert is as good as a learned top-1 router, or better",
    source="arXiv 2106.04426",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", CHANGES))


CHANGES = {"model": {"router": {"name": "hash", "table": "balanced"}, "losses": {}}}
