"""ReMoE on the quickstart's data and size: ReLU gates, as many active experts as top-k on average, steered sparsity.

Command:  python scripts/train.py --config=configs/remoe.py --workdir=runs/remoe
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/relu.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "test_bits_per_byte",
    "lower",
    baseline="top_k",
    says="fully differentiable ReLU routing beats top-k at the same number of active experts",
    source="arXiv 2412.14711",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", changes))


def changes(base: dict) -> dict:
    return {
        "model": {
            "router": {"name": "relu", "num_experts_per_tok": float(base["model"]["router"]["num_experts_per_tok"])},
            "dispatch": {"name": "dropless"},
            "losses": {},
        },
        "train": {"objective": {"name": "adaptive_sparsity"}},
    }
