"""LoRA-Mixer, first stage: an expert for each of ten tasks, trained by their labels.

Command:  python scripts/train.py --config=configs/lora/lora_mixer.py --init-from=PATH --workdir=runs/lora_mixer
Cost:     500 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/lora_mixer.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests)

The second stage goes on from it: `--init-from` this run, `--config.model.adapters.routing=soft` and
`--config.model.adapters.freeze_experts=true`.
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/lora:{arg}", {"model": {"adapters": ADAPTERS}}))


ADAPTERS = {
    "name": "lora_mixer",
    "num_experts": 10,
    "r": 4,
    "lora_alpha": 8.0,
    "routing": "task",
}
