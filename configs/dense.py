"""The dense decoder with the quickstart's active width: what every mixture is compared with.

Command:  python scripts/train.py --config=configs/dense.py --workdir=runs/dense
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/top_k.md
Presets:  "" (the above), "tiny" (20 steps of a very small model: seconds, for tests)
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend, read_config_file


def get_config(arg: str = "") -> ConfigDict:
    model = read_config_file(f"quickstart:{arg}")["model"]
    active = model["router"]["num_experts_per_tok"] * model["moe_intermediate_size"]
    changes = {"layers": model["layers"].replace("moe", "dense"), "intermediate_size": active}
    return ConfigDict(extend(f"quickstart:{arg}", {"model": changes}))
