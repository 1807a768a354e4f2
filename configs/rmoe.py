"""RMoE on the quickstart's data and size: the router's GRU state runs through the layers.

Command:  python scripts/train.py --config=configs/rmoe.py --workdir=runs/rmoe
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  unmeasured; the comparison fills it in
Presets:  "" (the above), "tiny" (20 steps of a very small model: seconds, for tests)
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", TINY if arg == "tiny" else FULL))


def changes(recurrent_size: int) -> dict:
    return {"model": {"router": {"name": "recurrent", "num_experts_per_tok": 2, "recurrent_size": recurrent_size}}}


FULL, TINY = changes(64), changes(16)
