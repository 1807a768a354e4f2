"""GLIDER, the first stage, which is PHATGOOSE's: a LoRA learns, frozen, the gate by which its tokens are known.

Command:  python scripts/train.py --config=configs/lora/glider.py --init-from=PATH --workdir=runs/gate
Cost:     100 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/glider.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests)

PATH: a run of `configs/lora/lora.py` on one task; what it has trained is frozen here. `moe_zoo.transform.join_experts`
makes one model of several such runs, `describe_experts` tells it what each is for; then nothing trains any more.
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/lora:{arg}", TINY if arg else FULL))


# rank and alpha are those of lora.py
ADAPTERS = {"name": "glider", "stage": "gate", "num_experts": 1}
FULL = {"model": {"adapters": ADAPTERS | {"r": 16, "lora_alpha": 32.0}}, "train": {"steps": 100}}
TINY = {"model": {"adapters": ADAPTERS | {"r": 4, "lora_alpha": 8.0}}}
