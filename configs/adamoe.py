"""AdaMoE on the quickstart's data and size: four picks among eight experts and eight nulls, two experts on average.

Command:  python scripts/train.py --config=configs/adamoe.py --workdir=runs/adamoe
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/null_experts.md
Presets:  "" (the above), "tiny" (20 steps of a very small model: seconds, for tests)
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", CHANGES))


CHANGES = {
    "model": {
        "router": {"name": "null_experts", "num_null_experts": 8, "picks_per_token": 4},
        "dispatch": {"name": "dropless"},
        "losses": {"null_load_balance": {"coef": 0.01}},
    },
}
