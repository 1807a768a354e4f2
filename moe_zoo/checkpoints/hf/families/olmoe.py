"""OLMoE (arXiv 2409.02060): query-key norm over the full width, raw softmax gates."""

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, Only, key
from moe_zoo.checkpoints.hf.layout import linear
from moe_zoo.checkpoints.hf.order import every
from moe_zoo.checkpoints.hf.rope import Rope

FAMILY = Family(
    model_type="olmoe",
    architectures=("OlmoeForCausalLM",),
    keys=(
        *C.SIZES,
        C.norm_eps(default=1e-5),
        C.tied(),
        key("intermediate_size", "moe_intermediate_size"),
        key("num_experts", default=64),
        key("num_experts_per_tok", "router.num_experts_per_tok", default=8),
        key("norm_topk_prob", "router.norm_topk_prob", default=False),
    ),
    parts=(
        C.Heads(),
        Rope(),
        every("moe"),
        C.BalanceLoss(0.01),
        Only({"clip_qkv": (None,), "attention_bias": (False,)}),
    ),
    fixed={"attention.qk_norm": "full"},
    layer={**C.ATTENTION, **C.QK_NORM, **C.NORMS, **C.EXPERTS, "ffn.router.kernel": linear("mlp.gate.weight")},
    whole=WHOLE,
)
