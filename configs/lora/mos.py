"""MoS: the layers' LoRAs of rank 8, put together from pools as large as LoRAs of rank 4.

Command:  python scripts/train.py --config=configs/lora/mos.py --init-from=PATH --workdir=runs/mos
Cost:     500 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/mos.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests), "cpu" (docs/adapters.md, compared)

What tells layers apart, one by one: `--config.model.adapters.shards_per_vector=1`, `private_rank=0`,
`pair_dissociation=False`, `subset_selection=False`; the last with `r` = `rank_budget` times the layers is pure sharing.
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "held_in_loss",
    "lower",
    baseline="lora",
    says="LoRAs of twice the rank, put together from pools of the same size, learn more",
    source="arXiv 2410.00938",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/lora:{arg}", {"model": {"adapters": {"": FULL, "tiny": TINY}.get(arg, CPU)}}))


FULL = {
    "name": "mos",
    "r": 8,
    "lora_alpha": 16.0,
    "rank_budget": 4,
    "private_rank": 1,
    "shards_per_vector": 4,
    "pair_dissociation": True,
    "subset_selection": True,
}
# of two layers more is not to be had
TINY = FULL | {"r": 4, "lora_alpha": 8.0, "rank_budget": 3, "shards_per_vector": 2}
CPU = FULL | {"r": 36, "lora_alpha": 72.0, "rank_budget": 18}
