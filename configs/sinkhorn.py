"""Sinkhorn routing (S-BASE) on the quickstart's data and size: load evened out by a transport plan, no balance loss.

Command:  python scripts/train.py --config=configs/sinkhorn.py --workdir=runs/sinkhorn
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/sinkhorn.md; measured as at inference, where the router is causal
Presets:  "" (the above), "tiny" (20 steps of a very small model: seconds, for tests)
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", CHANGES))


CHANGES = {
    "model": {
        "router": {"name": "sinkhorn", "num_experts_per_tok": 2, "iterations": 8},
        "losses": {"z_loss": {"coef": 0.001}},
    },
}
