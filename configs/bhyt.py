"""The quickstart's mixture with BHyT in place of its RMSNorms: a tanh that bounds, one statistic per block, not two.

Command:  python scripts/train.py --config=configs/bhyt.py --workdir=runs/bhyt
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/bhyt.md
Presets:  "" (the above), "tiny" (20 steps of a very small model: seconds, for tests)

Both statistics measured: --config.model.norm=bhyt_star; in the first of four layers only: `layers = "moe:exact 3*moe"`
with `variants = {"exact": {"norm": "bhyt_star"}}`. Attention taken to average over as many tokens as one sees:
--config.model.tanh_norm.tokens=position.
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", changes))


def changes(base: dict) -> dict:
    return {"model": {"norm": "bhyt", "tanh_norm": {"seq_len": base["data"]["seq_len"]}}}
