"""DeepSeek-V2 and V2-Lite (arXiv 2405.04434): latent attention, raw softmax gates, groups scored by their best."""

from typing import Any

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, Only, key
from moe_zoo.checkpoints.hf.latent import TENSORS, Latent
from moe_zoo.checkpoints.hf.layout import linear
from moe_zoo.checkpoints.hf.order import Given, dense_first
from moe_zoo.models import ModelConfig


class _Groups:
    """`n_group` and `topk_group` count only with `topk_method` "group_limited_greedy"."""

    def read(self, given: Given) -> dict[str, Any]:
        if given.get("topk_method", "greedy") == "greedy":
            return {}
        return {"router.n_group": given["n_group"], "router.topk_group": given["topk_group"]}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        c = config.router.config
        groups, kept = getattr(c, "n_group", 1), getattr(c, "topk_group", 1)
        method = "group_limited_greedy" if groups > 1 else "greedy"
        return {"topk_method": method, "n_group": groups, "topk_group": kept}


FAMILY = Family(
    model_type="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    keys=(
        *C.SIZES,
        key("rms_norm_eps", "norm_eps", default=1e-6),
        C.tied(),
        key("intermediate_size"),
        key("moe_intermediate_size"),
        key("routed_scaling_factor", "router.routed_scaling_factor", default=1.0),
        key("n_routed_experts", "num_experts", default=64, also=("num_experts", "num_local_experts")),
        key("num_experts_per_tok", "router.num_experts_per_tok"),
    ),
    parts=(
        Latent(),
        dense_first(),
        C.SharedExperts(2),
        C.NoLoss(),
        Only(
            {
                "attention_bias": (False,), "mlp_bias": (False,), "moe_layer_freq": (1,), "norm_topk_prob": (False,),
                "topk_method": ("greedy", "group_limited_greedy"),
            }
        ),
        _Groups(),
    ),
    fixed={"attention.rope_interleaved": True, "router.norm_topk_prob": False, "router.group_score": "max"},
    layer={
        **TENSORS,
        **C.NORMS,
        **C.DENSE,
        **C.EXPERTS,
        **C.gated("ffn.shared", "mlp.shared_experts"),
        "ffn.router.kernel": linear("mlp.gate.weight"),
    },
    whole=WHOLE,
)  # fmt: skip
