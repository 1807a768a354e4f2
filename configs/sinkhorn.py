"""Sinkhorn routing (S-BASE) on the quickstart's data and size: one expert by a plan with even load, no balance loss.

Command:  python scripts/train.py --config=configs/sinkhorn.py --workdir=runs/sinkhorn
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/sinkhorn.md; measured as at inference, where the router is causal
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "test_bits_per_byte",
    "lower",
    baseline="hash",
    says="balanced assignment by Sinkhorn beats a fixed map from token to expert",
    source="arXiv 2202.01169",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", CHANGES))


CHANGES = {"model": {"router": {"name": "sinkhorn", "num_experts_per_tok": 1}, "losses": {"z_loss": {"coef": 0.001}}}}
