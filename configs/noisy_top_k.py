"""Noisy top-k gating on the quickstart's data and size: learned noise before the choice, importance and load losses.

Command:  python scripts/train.py --config=configs/noisy_top_k.py --workdir=runs/noisy_top_k
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/noisy_top_k.md
Presets:  "" (the above), "tiny" (20 steps of a very small model: seconds, for tests)
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", CHANGES))


CHANGES = {
    "model": {
        "router": {"name": "noisy_top_k", "num_experts_per_tok": 2},
        "losses": {"importance": {"coef": 0.1}, "expected_load": {"coef": 0.1}},
    },
}
