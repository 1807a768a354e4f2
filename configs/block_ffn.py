"""BlockFFN on the quickstart's data: many small ungated experts, ReLU and RMSNorm, locality and chunk losses.

Command:  python scripts/train.py --config=configs/block_ffn.py --workdir=runs/block_ffn
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  unmeasured; the comparison fills it in
Presets:  "" (the above), "tiny" (20 steps of a very small model: seconds, for tests)
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", TINY if arg == "tiny" else FULL))


def changes(num_experts: int, width: int, expected_active: float, row_budget: float, layers: int, **schedule) -> dict:
    # losses add up over layers here; the paper's coefficients are for their mean
    return {
        "model": {
            "num_experts": num_experts,
            "moe_intermediate_size": width,
            "router": {"name": "block_ffn", "expected_active": expected_active},
            "experts": {"name": "feed_forward", "activation": "silu", "gated": False},
            "dispatch": {"name": "dropless", "row_budget": row_budget},
            "losses": {"locality": {"coef": 2e-3 / layers}, "chunk_sparsity": {"coef": 5e-2 / layers}},
        },
        "train": {"objective": {"name": "scheduled_loss", **schedule}},
    }


# the paper's schedule begins at step 1000 and turns every 100; these runs have about 1400 steps, and 20
FULL = changes(16, 64, 6.0, 10.0, layers=4, start=100, every=50)
TINY = changes(8, 16, 4.0, 6.0, layers=2, start=5, every=5)
