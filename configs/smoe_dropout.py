"""SMoE-Dropout on the quickstart's data and size: a frozen random router, from half to all experts as training goes on.

Command:  python scripts/train.py --config=configs/smoe_dropout.py --workdir=runs/smoe_dropout
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/smoe_dropout.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "test_bits_per_byte",
    "lower",
    baseline="top_k",
    says="a random router that never trains, with more and more experts, beats a learned one",
    source="arXiv 2303.01610",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", changes))


def changes(base: dict) -> dict:
    steps = base["train"].get("steps") or 1000  # about what the quickstart does in its minutes
    return {"model": {"router": {"name": "smoe_dropout", "total_steps": steps}, "losses": {}}}
