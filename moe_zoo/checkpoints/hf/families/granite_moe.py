"""Granite 3 MoE, with or without a shared expert: multipliers everywhere, experts stacked on disk, gate above up."""

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, key
from moe_zoo.checkpoints.hf.layout import linear
from moe_zoo.checkpoints.hf.order import every
from moe_zoo.checkpoints.hf.rope import Rope


def _family(model_type: str, architecture: str, keys: tuple, fixed: dict, layer: dict) -> Family:
    return Family(
        model_type=model_type,
        architectures=(architecture,),
        keys=(
            *C.SIZES,
            C.norm_eps(),
            C.tied(),
            key("intermediate_size", "moe_intermediate_size"),
            key("attention_bias", "attention.qkv_bias", "attention.output_bias", default=False),
            key("embedding_multiplier", default=1.0),
            key("residual_multiplier", default=1.0),
            key("logits_scaling", default=1.0),
            key("attention_multiplier", "attention.softmax_scale", default=1.0),
            key("num_local_experts", "num_experts", default=8),
            key("num_experts_per_tok", "router.num_experts_per_tok", default=2),
            *keys,
        ),
        parts=(C.Heads(), Rope(), every("moe"), C.BalanceLoss()),
        fixed={"router.score_function": "softmax_of_top_k", **fixed},
        layer={
            **C.ATTENTION,
            **C.QKV_BIAS,
            **C.O_BIAS,
            **C.NORMS,
            "ffn.router.kernel": linear("block_sparse_moe.router.layer.weight"),
            "ffn.experts.w_gate": linear("block_sparse_moe.input_linear.weight", batched=True, part=0, parts=2),
            "ffn.experts.w_up": linear("block_sparse_moe.input_linear.weight", batched=True, part=1, parts=2),
            "ffn.experts.w_down": linear("block_sparse_moe.output_linear.weight", batched=True),
            **layer,
        },
        whole=WHOLE,
    )


FAMILY = _family("granitemoe", "GraniteMoeForCausalLM", (), {}, {})
SHARED = _family(
    "granitemoeshared",
    "GraniteMoeSharedForCausalLM",
    (key("shared_intermediate_size", "shared_expert_size", default=0),),
    {},
    {
        "ffn.shared.w_gate": linear("shared_mlp.input_linear.weight", part=0, parts=2),
        "ffn.shared.w_up": linear("shared_mlp.input_linear.weight", part=1, parts=2),
        "ffn.shared.w_down": linear("shared_mlp.output_linear.weight"),
    },
)
