"""SMoE-Dropout on the quickstart's data and size: a frozen random router, 4 to 8 experts as training goes on.

Command:  python scripts/train.py --config=configs/smoe_dropout.py --workdir=runs/smoe_dropout
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  unmeasured; the comparison fills it in
Presets:  "" (the above), "tiny" (20 steps of a very small model: seconds, for tests)
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", TINY if arg == "tiny" else FULL))


def changes(total_steps: int) -> dict:
    return {"model": {"router": {"name": "smoe_dropout", "total_steps": total_steps}, "losses": {}}}


FULL, TINY = changes(1000), changes(20)
