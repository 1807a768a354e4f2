"""THOR on the quickstart's data and size: experts drawn at random, two passes per batch that should agree.

Command:  python scripts/train.py --config=configs/thor.py --workdir=runs/thor
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores: half as many steps, each of two passes
Reaches:  see docs/zoo/thor.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "test_bits_per_byte",
    "lower",
    baseline="switch",
    says="experts drawn at random and made to agree beat a learned top-1 router",
    source="arXiv 2110.04260",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", CHANGES))


CHANGES = {
    "model": {"router": {"name": "thor"}, "dispatch": {"name": "dropless"}, "losses": {}},
    "train": {"objective": {"name": "thor", "alpha": 5.0}},
}
