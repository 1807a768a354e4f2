"""Sparsity-constrained transport on the quickstart's data and size: experts take the tokens of a plan, per sequence.

Command:  python scripts/train.py --config=configs/sparse_ot.py --workdir=runs/sparse_ot
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  not causal: its bits per byte can see the future and compare with no causal entry's
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "load_violation",
    "lower",
    baseline="top_k",
    says="a transport plan with equal weight on every expert loads them evenly without a balance loss",
    source="arXiv 2209.15466",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", changes))


def changes(base: dict) -> dict:
    K = float(base["model"]["router"]["num_experts_per_tok"])
    return {
        "model": {
            "router": {"name": "sparse_ot", "capacity_factor": K, "group": "sequence"},
            "dispatch": {"name": "slots"},
            "losses": {},
        },
    }
