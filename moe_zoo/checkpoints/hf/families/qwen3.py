"""Qwen3 (arXiv 2505.09388), dense: query-key norm per head instead of biases."""

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, key
from moe_zoo.checkpoints.hf.order import beyond_full, every, windows
from moe_zoo.checkpoints.hf.rope import Rope

FAMILY = Family(
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    keys=(
        *C.SIZES,
        C.norm_eps(),
        C.tied(),
        key("intermediate_size"),
        key("attention_bias", "attention.qkv_bias", "attention.output_bias", default=False),
    ),
    parts=(C.Heads(size=128), Rope(), every("dense", windows(beyond_full))),
    fixed={"attention.qk_norm": "head"},
    layer={**C.ATTENTION, **C.QKV_BIAS, **C.O_BIAS, **C.QK_NORM, **C.NORMS, **C.DENSE},
    whole=WHOLE,
)
