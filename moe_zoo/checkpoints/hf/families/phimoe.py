"""Phi-3.5-MoE (arXiv 2404.14219): sparsemixer routing, LayerNorm, biases, and longrope."""

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, Only, key
from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.hf.order import every
from moe_zoo.checkpoints.hf.rope import Rope

FAMILY = Family(
    model_type="phimoe",
    architectures=("PhimoeForCausalLM", "PhiMoEForCausalLM"),
    keys=(
        *C.SIZES,
        C.norm_eps(default=1e-5),
        C.tied(),
        key("sliding_window", "attention.sliding_window", default=None),
        key("attention_bias", "attention.qkv_bias", "attention.output_bias", default=False),
        key("lm_head_bias", default=False),
        key("intermediate_size", "moe_intermediate_size"),
        key("num_local_experts", "num_experts", default=16),
        key("router_jitter_noise", "router.jitter_eps", default=0.01),
    ),
    parts=(C.Heads(kv=8), Rope(1e6), every("moe"), C.BalanceLoss(), Only({"num_experts_per_tok": (2,)})),
    fixed={"norm": "layer", "router.name": "sparsemixer"},
    layer={
        **C.ATTENTION,
        **C.QKV_BIAS,
        **C.O_BIAS,
        **C.NORMS,
        **C.NORM_BIAS,
        **C.MIXTRAL_EXPERTS,
        "ffn.router.kernel": linear("block_sparse_moe.gate.weight"),
    },
    whole={**WHOLE, "norm.bias": Stored("model.norm.bias"), "head.bias": Stored("lm_head.bias")},
)
