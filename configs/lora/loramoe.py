"""LoRAMoE: softmax gates over all experts, balanced within two types of tasks.

Command:  python scripts/train.py --config=configs/lora/loramoe.py --init-from=PATH --workdir=runs/loramoe
Cost:     500 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/loramoe.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests), "cpu" (docs/adapters.md, compared)

`task_types` is the type of every domain of the data, by its id: here letters are 1, digits and real text 0.
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "held_in_loss",
    "lower",
    baseline="lora",
    says="several LoRAs behind a softmax router, balanced within types of tasks, do better on many tasks than one",
    source="arXiv 2312.09979",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/lora:{arg}", {"model": {"adapters": ADAPTERS | (CPU if arg == "cpu" else {})}}))


ADAPTERS = {
    "name": "loramoe",
    "num_experts": 4,
    "r": 4,
    "lora_alpha": 8.0,
    "blc_weight": 0.01,
    "blc_alpha": 0.1,
    "task_types": [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
}
CPU = {"task_types": [1, 1, 1, 1, 0, 0, 0, 0]}
