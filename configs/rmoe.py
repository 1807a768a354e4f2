"""RMoE on the quickstart's data and size: the router's GRU state runs through the layers.

Command:  python scripts/train.py --config=configs/rmoe.py --workdir=runs/rmoe
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/recurrent.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "test_bits_per_byte",
    "lower",
    baseline="top_k",
    says="routers that remember what earlier layers' routers saw beat routers that do not",
    source="arXiv 2408.06793",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", changes))


def changes(base: dict) -> dict:
    model = base["model"]
    K, size = model["router"]["num_experts_per_tok"], min(128, model["hidden_size"] // 2)  # 128 in the paper
    return {"model": {"router": {"name": "recurrent", "num_experts_per_tok": K, "recurrent_size": size}}}
