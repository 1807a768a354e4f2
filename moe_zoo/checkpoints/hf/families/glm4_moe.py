"""GLM-4.5 to 4.7 (arXiv 2508.06471): the routing of DeepSeek-V3 with a shared expert, grouped queries, half-rotary."""

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, key
from moe_zoo.checkpoints.hf.order import dense_first
from moe_zoo.checkpoints.hf.rope import Rope

FAMILY = Family(
    model_type="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    keys=(
        *C.SIZES,
        C.norm_eps(default=1e-5),
        C.tied(),
        *C.V3_KEYS,
        key("attention_bias", "attention.qkv_bias", default=False),
        key("use_qk_norm", "attention.qk_norm", default=False, values=((False, "none"), (True, "head"))),
        key("n_routed_experts", "num_experts", default=128, also=("num_local_experts",)),
        key("num_experts_per_tok", "router.num_experts_per_tok", default=8),
        key("norm_topk_prob", "router.norm_topk_prob", default=True),
    ),
    parts=(C.Heads(kv=8), Rope(partial=0.5), dense_first(default=1), C.SharedExperts(1), C.NoLoss()),
    fixed=C.V3_ROUTER,
    layer={**C.ATTENTION, **C.QKV_BIAS, **C.QK_NORM, **C.NORMS, **C.DENSE, **C.V3_MOE},
    whole=WHOLE,
    extra_layers=True,
)
