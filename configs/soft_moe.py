"""Soft MoE on the quickstart's data and size: as many slots as tokens, per sequence.

Command:  python scripts/train.py --config=configs/soft_moe.py --workdir=runs/soft_moe
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  not causal: its bits per byte can see the future and compare with no other entry's
Presets:  "" (the above), "tiny" (20 steps of a very small model: seconds, for tests)
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", TINY if arg == "tiny" else FULL))


def changes(slots_per_expert: int) -> dict:
    return {
        "model": {
            "router": {"name": "soft", "slots_per_expert": slots_per_expert},
            "dispatch": {"name": "slots"},
            "losses": {},
        },
    }


FULL, TINY = changes(16), changes(16)
