"""Mixture of depths: the dense decoder, but every second block takes an eighth of a sequence's tokens.

Command:  python scripts/train.py --config=configs/mod.py --workdir=runs/mod
          staged MoDE, around routed blocks: --config.model.layers="2*(moe moe:mod)"
          the control, random tokens: --config.model.layers="2*(dense dense:random_depth)"
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
          a token of scale `cpu` has 0.59 of dense.py's FLOPs
Reaches:  see docs/zoo/mod.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.models.config import parse_layers
from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"dense:{arg}", changes))


def changes(base: dict) -> dict:
    (segment,) = parse_layers(base["model"]["layers"], "model.layers")
    return {"model": {"layers": f"{segment.repeats // 2}*(dense dense:mod)"}}
