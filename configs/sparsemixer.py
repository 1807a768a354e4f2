"""SparseMixer, as in Phi-3.5-MoE, on the quickstart's data and size: experts picked one after
the other, each by its own softmax.

Command:  python scripts/train.py --config=configs/sparsemixer.py --workdir=runs/sparsemixer
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/sparsemixer.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "test_bits_per_byte",
    "lower",
    baseline="top_k",
    says="a gradient through the choice of experts trains a better mixture than the conventional one",
    source="arXiv 2310.00811, 2409.12136",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", changes))


def changes(base: dict) -> dict:
    K = base["model"]["router"]["num_experts_per_tok"]
    return {"model": {"router": {"name": "sparsemixer", "num_experts_per_tok": K, "jitter_eps": 0.1}}}
