"""Top-P routing on the quickstart's data and size, p steered so that tokens have as many experts as top-k on average.

The paper's fixed p of 0.4, whose number of experts follows the router: --config.model.router.controller_rate=0

Command:  python scripts/train.py --config=configs/top_p.py --workdir=runs/top_p
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/top_p.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "test_bits_per_byte",
    "lower",
    baseline="top_k",
    says="as many experts as the router is unsure beat the same number for every token, at no more of them on average",
    source="arXiv 2403.07652",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", changes))


def changes(base: dict) -> dict:
    K = float(base["model"]["router"]["num_experts_per_tok"])
    return {
        "model": {
            "router": {"name": "top_p", "top_p": 0.4, "mean_experts": K, "controller_rate": 0.1},
            "dispatch": {"name": "dropless"},
            "losses": {"load_balance": {"coef": 0.01}, "entropy_loss": {"coef": 1e-4}},
        },
    }
