"""Hybrid-k on the quickstart's data and size: while training, the expert of a text's domain is among its experts.

Command:  python scripts/train.py --config=configs/hybrid_k.py --workdir=runs/hybrid_k
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/hybrid_k.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "specialization",
    "higher",
    baseline="top_k",
    says="a router that is shown the expert of a text's language in training parts the languages without being told",
    source="arXiv 2410.10626",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", changes))


def changes(base: dict) -> dict:
    K = base["model"]["router"]["num_experts_per_tok"]
    return {"model": {"router": {"name": "hybrid_k", "num_experts_per_tok": K}, "losses": {}}}
