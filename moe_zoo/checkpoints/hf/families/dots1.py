"""dots.llm1 (arXiv 2506.05767): the routing of DeepSeek-V3 without groups, query-key norm per head."""

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, key
from moe_zoo.checkpoints.hf.order import dense_first, windows
from moe_zoo.checkpoints.hf.rope import Rope

FAMILY = Family(
    model_type="dots1",
    architectures=("Dots1ForCausalLM",),
    keys=(
        *C.SIZES,
        C.norm_eps(),
        C.tied(),
        *C.V3_KEYS,
        key("attention_bias", "attention.qkv_bias", "attention.output_bias", default=False),
        key("n_routed_experts", "num_experts", also=("num_local_experts",)),
        key("num_experts_per_tok", "router.num_experts_per_tok"),
        key("norm_topk_prob", "router.norm_topk_prob", default=False),
    ),
    parts=(
        C.Heads(),
        Rope(),
        dense_first(windows(lambda given, i: i >= given.get("max_window_layers", 62), switched=False)),
        C.SharedExperts(),
        C.NoLoss(),
    ),
    fixed={"attention.qk_norm": "head", **C.V3_ROUTER},
    layer={**C.ATTENTION, **C.QKV_BIAS, **C.O_BIAS, **C.QK_NORM, **C.NORMS, **C.DENSE, **C.V3_MOE},
    whole=WHOLE,
)
