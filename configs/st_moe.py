"""ST-MoE on the quickstart's data and size: GShard's gating with its second expert kept more often, and the z-loss.

Command:  python scripts/train.py --config=configs/st_moe.py --workdir=runs/st_moe
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
    baseline="switch",
    says="two experts per token under a tight capacity are better than one",
    source="arXiv 2202.08906",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", CHANGES))


CHANGES = {
    "model": {
        "router": {"name": "gshard", "second_threshold": 0.2},
        # the paper's factors, 1.25 and 2, are of S / E; ours of 2 S / E
        "dispatch": {
            "name": "capacity",
            "capacity_factor": 0.625,
            "eval_capacity_factor": 1.0,
            "group": "sequence",
        },
        "losses": {"load_balance": {"coef": 0.01, "choices": "first"}, "z_loss": {"coef": 0.001}},
    },
}
