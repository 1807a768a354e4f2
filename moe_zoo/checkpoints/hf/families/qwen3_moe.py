"""Qwen3-MoE (arXiv 2505.09388): query-key norm per head, gates renormalised, no shared expert."""

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, key
from moe_zoo.checkpoints.hf.layout import linear
from moe_zoo.checkpoints.hf.order import sparse_step, windows
from moe_zoo.checkpoints.hf.rope import Rope

FAMILY = Family(
    model_type="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    keys=(
        *C.SIZES,
        C.norm_eps(),
        C.tied(),
        key("intermediate_size"),
        key("moe_intermediate_size"),
        key("attention_bias", "attention.qkv_bias", "attention.output_bias", default=False),
        key("num_experts", default=128, also=("num_local_experts",)),
        key("num_experts_per_tok", "router.num_experts_per_tok", default=8),
        key("norm_topk_prob", "router.norm_topk_prob", default=False),
    ),
    parts=(C.Heads(kv=4), Rope(), sparse_step(windows(lambda given, i: True)), C.BalanceLoss()),
    fixed={"attention.qk_norm": "head"},
    layer={
        **C.ATTENTION,
        **C.QKV_BIAS,
        **C.O_BIAS,
        **C.QK_NORM,
        **C.NORMS,
        **C.DENSE,
        **C.EXPERTS,
        "ffn.router.kernel": linear("mlp.gate.weight"),
    },
    whole=WHOLE,
)
