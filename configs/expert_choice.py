"""Expert choice on the quickstart's data and size: experts take tokens, as many per token on average, per sequence.

Command:  python scripts/train.py --config=configs/expert_choice.py --workdir=runs/expert_choice
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  not causal: its bits per byte can see the future and compare with no other entry's
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "load_violation",
    "lower",
    baseline="top_k",
    says="experts that pick their tokens are loaded evenly without a balance loss",
    source="arXiv 2202.09368",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", changes))


def changes(base: dict) -> dict:
    K = float(base["model"]["router"]["num_experts_per_tok"])
    return {
        "model": {
            "router": {"name": "expert_choice", "capacity_factor": K, "group": "sequence"},
            "dispatch": {"name": "slots"},
            "losses": {},
        },
    }
