"""Qwen3.5-MoE, the text model: Qwen3-Next with the projections of Gated DeltaNet in matrices of their own."""

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.families.qwen3_next import FIXED, KEYS, LAYER, is_full
from moe_zoo.checkpoints.hf.family import WHOLE, Family, Only, key
from moe_zoo.checkpoints.hf.layout import linear
from moe_zoo.checkpoints.hf.order import every, hybrid
from moe_zoo.checkpoints.hf.rope import Rope

FAMILY = Family(
    model_type="qwen3_5_moe_text",
    architectures=("Qwen3_5MoeForCausalLM",),
    keys=(
        *KEYS,
        key("num_experts", default=256),
        key("num_experts_per_tok", "router.num_experts_per_tok", default=8),
    ),
    parts=(
        C.Heads(kv=2, size=256),
        Rope(partial=0.25),
        hybrid(every("moe"), is_full),
        C.BalanceLoss(),
        Only({"attention_bias": (False,)}),
    ),
    fixed=FIXED | {"mixer.projections": "split", "router.norm_topk_prob": True},
    layer={**LAYER, **{f"mixer.in_{x}": linear(f"linear_attn.in_proj_{x}.weight") for x in ("qkv", "z", "b", "a")}},
    whole=WHOLE,
    unused=(r"mtp.*", r"model\.visual.*"),
)
