"""The routing of DeepSeek-V3 on the quickstart's data and size: sigmoid scores, a balancing bias instead of a balance
loss (arXiv 2408.15664), expert groups, a shared expert, a dense first block.

Command:  python scripts/train.py --config=configs/deepseek_v3.py --workdir=runs/deepseek_v3
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/top_k.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "test_bits_per_byte",
    "lower",
    baseline="top_k",
    says="twice as many experts of half the width, one of them shared, balanced without a loss, beat plain top-k",
    source="arXiv 2401.06066, 2408.15664, 2412.19437",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", changes))


def changes(base: dict) -> dict:
    """Half as wide, twice as many: 2K - 1 routed experts and the shared one are the compute of K; a dense block too."""
    model = base["model"]
    K, width, (layers, _) = (
        model["router"]["num_experts_per_tok"],
        model["moe_intermediate_size"],
        model["layers"].split("*"),
    )
    return {
        "model": {
            "layers": f"1*dense {int(layers) - 1}*moe",
            "num_experts": 2 * model["num_experts"],
            "moe_intermediate_size": width // 2,
            "shared_expert_size": width // 2,
            "intermediate_size": K * width,
            "router": {
                "num_experts_per_tok": 2 * K - 1,
                "score_function": "sigmoid",
                "norm_topk_prob": True,
                "routed_scaling_factor": 2.5,
                "n_group": 4,
                "topk_group": 2,
                "group_score": "top2_sum",
                "correction_bias": True,
                "bias_update_rate": 1e-3,
            },
            "losses": {},
        },
    }
