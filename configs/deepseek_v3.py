"""The routing of DeepSeek-V3 on the quickstart's data and size: sigmoid scores, a balancing bias instead of a balance
loss (arXiv 2408.15664), expert groups, a shared expert, a dense first block.

Command:  python scripts/train.py --config=configs/deepseek_v3.py --workdir=runs/deepseek_v3
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/top_k.md
Presets:  "" (the above), "tiny" (20 steps of a very small model: seconds, for tests)
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", TINY if arg == "tiny" else FULL))


def changes(layers: str, num_experts: int, width: int, K: int, shared: int) -> dict:
    return {
        "model": {
            "layers": layers,
            "num_experts": num_experts,
            "moe_intermediate_size": width,
            "shared_expert_size": shared,
            "router": {
                "num_experts_per_tok": K,
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


FULL = changes("1*dense 3*moe", num_experts=16, width=128, K=3, shared=128)
TINY = changes("1*dense 1*moe", num_experts=8, width=16, K=2, shared=16)
