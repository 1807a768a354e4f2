"""SAME: a mixture of LoRA beside the feed-forward layers, trained on one task after the other.

Command:  a run for each task, begun from the one before; PATH: a run of ours or a published directory
          python scripts/train.py --config=configs/lora/same.py --init-from=PATH --workdir=runs/first \
              --config.data.source=first.jsonl
          python scripts/train.py --config=configs/lora/same.py --init-from=runs/first --workdir=runs/second \
              --config.data.source=second.jsonl
Cost:     500 steps of 16 rows of 128 tokens for each task
Reaches:  see docs/zoo/same.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests)
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/lora:{arg}", {"model": {"adapters": TINY if arg else FULL}}))


FULL = {"name": "same", "target_modules": ["ffn.*"], "num_experts": 5, "r": 4, "lora_alpha": 8.0}
TINY = FULL | {"num_experts": 3, "r": 2, "lora_alpha": 4.0, "refresh_every": 5}
