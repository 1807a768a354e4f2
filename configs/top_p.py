"""Top-P routing on the quickstart's data and size: as many experts as hold 0.4 of the router's probability.

Command:  python scripts/train.py --config=configs/top_p.py --workdir=runs/top_p
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/top_p.md
Presets:  "" (the above), "tiny" (20 steps of a very small model: seconds, for tests)
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", CHANGES))


CHANGES = {
    "model": {
        "router": {"name": "top_p", "top_p": 0.4},
        "dispatch": {"name": "dropless"},
        "losses": {"load_balance": {"coef": 0.01}, "entropy_loss": {"coef": 1e-4}},
    },
}
