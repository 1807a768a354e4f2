"""BlockFFN on the quickstart's data: many small ungated experts, ReLU and RMSNorm, locality and chunk losses.

Command:  python scripts/train.py --config=configs/block_ffn.py --workdir=runs/block_ffn
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/block_ffn.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "test_bits_per_byte",
    "lower",
    baseline="top_k",
    says="ReLU and RMSNorm over small experts beat top-k at the same number of active parameters",
    source="arXiv 2507.08771",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", changes))


def changes(base: dict) -> dict:
    model, steps = base["model"], base["train"].get("steps") or 1000  # about what the quickstart does in its minutes
    experts, layers = 2 * model["num_experts"], int(model["layers"].split("*")[0])
    return {
        "model": {
            "num_experts": experts,
            "moe_intermediate_size": model["moe_intermediate_size"] // 4,
            "router": {"name": "block_ffn", "expected_active": 0.375 * experts},
            "experts": {"name": "feed_forward", "activation": "silu", "gated": False},
            "dispatch": {"name": "dropless", "row_budget": 0.625 * experts},
            # losses add up over layers here; the paper's coefficients are for their mean
            "losses": {"locality": {"coef": 2e-3 / layers}, "chunk_sparsity": {"coef": 5e-2 / layers}},
        },
        # the paper's schedule begins at step 1000 and turns every 100
        "train": {"objective": {"name": "scheduled_loss", "start": steps // 10, "every": max(1, steps // 20)}},
    }
