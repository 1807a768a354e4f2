"""Plain LoRA beside the attention projections of any model that can be loaded; the other mixtures begin from this file.

Command:  python scripts/train.py --config=configs/lora/lora.py --init-from=PATH --workdir=runs/lora
          PATH: a run of ours (`make quickstart` leaves runs/quickstart) or a published directory
Cost:     500 steps of 16 rows of 128 tokens
Reaches:  see docs/zoo/lora.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests), "cpu" (docs/adapters.md, compared: eight
          tasks, half of them on real text)

The tasks are the data's domains: fourteen tasks, ten on strings and four on real text, or
`--config.data.source=tasks:reverse` (of one, or some), or `--config.data.source=FILE`, records with `prompt`, `answer`
and `domain`.
`--config.model.adapters.target_modules="('mixer.*', 'ffn.*')"` takes other linear layers, by pattern.
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Reference
from moe_zoo.core.schema import overlay
from moe_zoo.train.config import preset

CLAIM = Reference(says="one low-rank update for all tasks: what every mixture is compared with")


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(preset(arg, {"": FULL, "tiny": TINY, "cpu": CPU}))


FULL = {
    "model": {"adapters": {"name": "lora", "r": 16, "lora_alpha": 32.0}},
    "data": {"source": "tasks", "seq_len": 128, "batch_size": 16, "eval_batch_size": 64},
    "optim": {"name": "adamw", "learning_rate": 2e-3, "b2": 0.999, "weight_decay": 0.0, "warmup_steps": 20},
    "train": {"steps": 500},
    "checkpoint": {"every": 250},
    "log": {"every": 20, "eval_every": 250, "eval_rows": 256, "sample_prompt": "reverse:hello=", "sample_tokens": 8},
}

# the model is what a run without --init-from would have; only tests make one
TINY = FULL | {
    "model": {
        "hidden_size": 32,
        "layers": "2*dense",
        "intermediate_size": 64,
        "attention": {"num_attention_heads": 2},
        "adapters": {"name": "lora", "r": 4, "lora_alpha": 8.0},
    },
    "data": {"source": "tasks:reverse,swap_case,initials,digit_sum", "seq_len": 64, "batch_size": 8},
    "optim": FULL["optim"] | {"learning_rate": 1e-2, "warmup_steps": 5},
    "train": {"steps": 20},
    "checkpoint": {"every": 10},
    "log": FULL["log"] | {"every": 5, "eval_every": 10, "eval_rows": 32},
}

# the comparison's: scripts/compare_lora.py puts it beside its base, and gives others ranks that train as much as this
CPU = overlay(
    FULL,
    {
        "model": {"adapters": {"r": 18, "lora_alpha": 36.0}},
        "data": {
            "source": "tasks:reverse,swap_case,shift,initials,kind,category,completion,language",
            "batch_size": 8,
            "eval_batch_size": 32,
        },
        "optim": {"learning_rate": 5e-3, "warmup_steps": 5},
        "train": {"steps": 200},
    },
)
