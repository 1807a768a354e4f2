"""AdaMoE on the quickstart's data and size: as many nulls as experts and twice top-k's picks, so as many experts as it.

Command:  python scripts/train.py --config=configs/adamoe.py --workdir=runs/adamoe
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/null_experts.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "test_bits_per_byte",
    "lower",
    baseline="top_k",
    says="null experts, which let tokens have more or fewer true ones, beat top-k at the same number on average",
    source="arXiv 2406.13233",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", changes))


def changes(base: dict) -> dict:
    E, K = base["model"]["num_experts"], base["model"]["router"]["num_experts_per_tok"]
    return {
        "model": {
            "router": {"name": "null_experts", "num_null_experts": E, "picks_per_token": 2 * K},
            "dispatch": {"name": "dropless"},
            "losses": {"null_load_balance": {"coef": 0.01}},
        },
    }
