"""Attention-aware routing on the quickstart's data and size: tokens mix the choices of those they attend to.

Command:  python scripts/train.py --config=configs/attention_aware.py --workdir=runs/attention_aware
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/attention_aware.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "test_bits_per_byte",
    "lower",
    baseline="top_k",
    says="tokens that share their choice of experts along the attention beat tokens that choose alone",
    source="arXiv 2505.00792",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", changes))


def changes(base: dict) -> dict:
    K = base["model"]["router"]["num_experts_per_tok"]
    return {"model": {"router": {"name": "attention_aware", "num_experts_per_tok": K}}}
