"""Pre-gating on the quickstart's data and size: a small transformer over the bytes picks one expert for all layers.

Command:  python scripts/train.py --config=configs/pre_gate.py --workdir=runs/pre_gate
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/pre_gate.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "test_bits_per_byte",
    "lower",
    baseline="hash",
    says="a route decided ahead from the tokens so far beats one decided from the current token alone",
    source="arXiv 2410.19123",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", changes))


def changes(base: dict) -> dict:
    size = min(64, base["model"]["hidden_size"] // 2)  # 64 in the authors' code
    return {"model": {"router": {"name": "pre_gate", "gate": "prob", "size": size}}}
