"""Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671): biases on q, k, v; raw gates; a gated shared expert."""

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, key
from moe_zoo.checkpoints.hf.layout import linear
from moe_zoo.checkpoints.hf.order import sparse_step, windows
from moe_zoo.checkpoints.hf.rope import Rope

FAMILY = Family(
    model_type="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    keys=(
        *C.SIZES,
        C.norm_eps(),
        C.tied(),
        key("intermediate_size"),
        key("moe_intermediate_size"),
        key("shared_expert_intermediate_size", "shared_expert_size"),
        key("qkv_bias", "attention.qkv_bias", default=True),
        key("num_experts", default=60),
        key("num_experts_per_tok", "router.num_experts_per_tok", default=4),
        key("norm_topk_prob", "router.norm_topk_prob", default=False),
    ),
    parts=(
        C.Heads(),
        Rope(),
        sparse_step(windows(lambda given, i: (i + 1) % 2 == 1 and i < given.get("max_window_layers", 28))),
        C.BalanceLoss(),
    ),
    fixed={"shared_expert_gate": True},
    layer={
        **C.ATTENTION,
        **C.QKV_BIAS,
        **C.NORMS,
        **C.DENSE,
        **C.EXPERTS,
        **C.gated("ffn.shared", "mlp.shared_expert"),
        "ffn.shared_gate": linear("mlp.shared_expert_gate.weight"),
        "ffn.router.kernel": linear("mlp.gate.weight"),
    },
    whole=WHOLE,
)
