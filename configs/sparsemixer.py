"""SparseMixer, as in Phi-3.5-MoE, on the quickstart's data and size: two experts, each picked by its own softmax.

Command:  python scripts/train.py --config=configs/sparsemixer.py --workdir=runs/sparsemixer
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/sparsemixer.md
Presets:  "" (the above), "tiny" (20 steps of a very small model: seconds, for tests)
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", CHANGES))


CHANGES = {"model": {"router": {"name": "sparsemixer", "jitter_eps": 0.1}}}
