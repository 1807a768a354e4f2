"""A small dropless top-2 mixture of experts on the embedded corpus: what `make quickstart` runs.

Command:  python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart
Cost:     at most 5 minutes of training on 2 CPU cores
Reaches:  1.66 test bits per byte overall (gzip -9: 1.82) on Python 3.11.7; docs/zoo/top_k.md has the table
Presets:  "" (the above), "tiny" (20 steps of a very small model: seconds, for tests)
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import preset


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(preset(arg, {"": FULL, "tiny": TINY}))


FULL = {
    "model": {
        "hidden_size": 128,
        "layers": "4*moe",
        "num_experts": 8,
        "moe_intermediate_size": 256,
        "attention": {"num_attention_heads": 4},
        "ngram": {"orders": [2, 3, 4, 5, 6], "buckets": 16384},
        "router": {"name": "top_k", "num_experts_per_tok": 2},
    },
    "data": {"source": "embedded", "seq_len": 128, "batch_size": 16, "eval_stride": 64, "eval_batch_size": 64},
    "optim": {
        "name": "muon",
        "learning_rate": 8e-3,
        "lr_scales": ["ngram.*=2"],
        "schedule": "cosine",
        "warmup_steps": 50,
    },
    "train": {"minutes": 4.8},
    "checkpoint": {"every": 500},
    "log": {"every": 20, "eval_every": 200, "eval_rows": 512},
}

TINY = {
    "model": {
        "hidden_size": 32,
        "layers": "2*moe",
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "attention": {"num_attention_heads": 2},
        "router": {"name": "top_k", "num_experts_per_tok": 2},
    },
    "data": {"source": "embedded", "seq_len": 64, "batch_size": 8},
    "optim": {"warmup_steps": 5},
    "train": {"steps": 20},
    "checkpoint": {"every": 10},
    "log": {"every": 5, "eval_every": 10, "eval_rows": 32, "sample_tokens": 32},
}
