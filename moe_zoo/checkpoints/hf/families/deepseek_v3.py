"""DeepSeek-V3 and R1 (arXiv 2412.19437): latent attention, sigmoid scores with a bias, groups, a shared expert."""

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, Only, key
from moe_zoo.checkpoints.hf.latent import TENSORS, Latent
from moe_zoo.checkpoints.hf.order import dense_first

FAMILY = Family(
    model_type="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    keys=(
        *C.SIZES,
        key("rms_norm_eps", "norm_eps", default=1e-6),
        C.tied(),
        *C.V3_KEYS,
        key("rope_interleave", "attention.rope_interleaved", default=True),
        key("n_routed_experts", "num_experts", default=256, also=("num_local_experts",)),
        key("num_experts_per_tok", "router.num_experts_per_tok", default=8),
        key("norm_topk_prob", "router.norm_topk_prob", default=True),
    ),
    parts=(
        Latent(),
        dense_first(default=3),
        C.SharedExperts(1),
        C.NoLoss(),
        Only({"attention_bias": (False,), "moe_layer_freq": (1,)}),
    ),
    fixed=C.V3_ROUTER,
    layer={**TENSORS, **C.NORMS, **C.DENSE, **C.V3_MOE},
    whole=WHOLE,
    extra_layers=True,
)
