"""Noisy top-k gating on the quickstart's data and size: learned noise before the choice, importance and load losses.

Command:  python scripts/train.py --config=configs/noisy_top_k.py --workdir=runs/noisy_top_k
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/noisy_top_k.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "test_bits_per_byte",
    "lower",
    baseline="dense",
    says="sparsely gated experts beat a dense model of the same compute per token",
    source="arXiv 1701.06538",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", changes))


def changes(base: dict) -> dict:
    K = base["model"]["router"]["num_experts_per_tok"]
    return {
        "model": {
            "router": {"name": "noisy_top_k", "num_experts_per_tok": K},
            "losses": {"importance": {"coef": 0.1}, "expected_load": {"coef": 0.1}},
        },
    }
