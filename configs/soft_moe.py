"""Soft MoE on the quickstart's data and size: as many slots as tokens, per sequence.

Command:  python scripts/train.py --config=configs/soft_moe.py --workdir=runs/soft_moe
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  not causal: its bits per byte can see the future and compare with no other entry's
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "load_violation",
    "lower",
    baseline="top_k",
    says="slots that mix tokens use all experts alike, without a balance loss",
    source="arXiv 2308.00951",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", changes))


def changes(base: dict) -> dict:
    slots = max(1, base["data"]["seq_len"] // base["model"]["num_experts"])
    return {
        "model": {
            "router": {"name": "soft", "slots_per_expert": slots},
            "dispatch": {"name": "slots"},
            "losses": {},
        },
    }
