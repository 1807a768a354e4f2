"""The control of mixture of depths: the same blocks and capacity, tokens drawn at random.

Command:  python scripts/train.py --config=configs/random_depth.py --workdir=runs/random_depth
Cost:     as configs/mod.py
Reaches:  see docs/zoo/mod.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"mod:{arg}", changes))


def changes(base: dict) -> dict:
    return {"model": {"layers": base["model"]["layers"].replace("dense:mod", "dense:random_depth")}}
