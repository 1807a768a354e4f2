"""Sparsity-constrained transport on the quickstart's data and size: experts take the tokens of a plan, per sequence.

Command:  python scripts/train.py --config=configs/sparse_ot.py --workdir=runs/sparse_ot
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  not causal: its bits per byte can see the future and compare with no causal entry's
Presets:  "" (the above), "tiny" (20 steps of a very small model: seconds, for tests)
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", CHANGES))


CHANGES = {
    "model": {
        "router": {"name": "sparse_ot", "capacity_factor": 2.0, "group": "sequence"},
        "dispatch": {"name": "slots"},
        "losses": {},
    },
}
