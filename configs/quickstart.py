"""A small dropless top-2 mixture of experts on the embedded corpus: what `make quickstart` runs.

Command:  python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart
Cost:     at most 5 minutes of training on 2 CPU cores
Reaches:  1.66 test bits per byte overall (gzip -9: 1.82) on Python 3.11.7; docs/zoo/top_k.md has the table
Presets:  "" (the above), "tiny" (20 steps of a very small model: seconds, for tests), and the scales of the comparison
          (docs/comparison.md): "cpu" (minutes on 2 cores), "gpu" (minutes on one H100), "pod" (a configuration only)
"""

from ml_collections import ConfigDict

from moe_zoo.core.schema import overlay
from moe_zoo.train.config import preset


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(preset(arg, {"": FULL, "tiny": TINY, "cpu": CPU, "gpu": GPU, "pod": POD}))


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

# The scales: the same settings, without what would hide the routers behind it (n-gram embeddings), ended by steps.
CPU = overlay(
    FULL,
    {
        "model": {"ngram": {}},
        "data": {"eval_stride": 64},
        "optim": {"lr_scales": []},
        "train": {"minutes": None, "steps": 300},
        "checkpoint": {"every": 100},
        "log": {"every": 1, "eval_every": 25, "eval_rows": 128, "tensorboard": False},
    },
)

GPU = overlay(
    CPU,
    {
        "model": {
            "hidden_size": 512,
            "layers": "8*moe",
            "num_experts": 32,
            "moe_intermediate_size": 256,
            "attention": {"num_attention_heads": 8},
            "router": {"num_experts_per_tok": 4},
            "dtype": "bfloat16",
        },
        "data": {"seq_len": 512, "batch_size": 64, "eval_stride": 256, "eval_batch_size": 64},
        "train": {"steps": 3000},
        "checkpoint": {"every": 1000},
        "log": {"every": 5, "eval_every": 150, "eval_rows": 256},
    },
)

POD = overlay(
    GPU,
    {
        "model": {
            "hidden_size": 2048,
            "layers": "24*moe",
            "num_experts": 64,
            "moe_intermediate_size": 1024,
            "attention": {"num_attention_heads": 16},
            "router": {"num_experts_per_tok": 8},
            "remat": "block",
        },
        "data": {"seq_len": 2048, "batch_size": 512, "eval_stride": 1024, "eval_batch_size": 256},
        "optim": {"warmup_steps": 500},
        "train": {"steps": 20_000},
        "mesh": {"fsdp": 16, "expert": 8},
        "checkpoint": {"every": 1000},
        "log": {"every": 20, "eval_every": 1000, "eval_rows": 1024},
    },
)
