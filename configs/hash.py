"""Hash layers on the quickstart's data and size: the byte says which expert, by a table that is even over the data.

Command:  python scripts/train.py --config=configs/hash.py --workdir=runs/hash
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  unmeasured; the comparison fills it in
Presets:  "" (the above), "tiny" (20 steps of a very small model: seconds, for tests)
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", CHANGES))


CHANGES = {"model": {"router": {"name": "hash", "table": "balanced"}, "losses": {}}}
