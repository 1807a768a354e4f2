"""Chain-of-Experts on the quickstart's data and size: two iterations of every routed layer, half the experts in each.

Command:  python scripts/train.py --config=configs/chain_of_experts.py --workdir=runs/chain_of_experts
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/chain_of_experts.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "test_bits_per_byte",
    "lower",
    baseline="top_k",
    says="two iterations over half the experts beat one over all of them at equal compute",
    source="arXiv 2506.18945",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", changes))


def changes(base: dict) -> dict:
    K = base["model"]["router"]["num_experts_per_tok"]
    return {
        "model": {
            "router": {"name": "top_k", "num_experts_per_tok": max(K // 2, 1), "norm_topk_prob": False},
            "chain": {"iterations": 2, "inner_residual": True, "outer_residual": False},
        },
    }
