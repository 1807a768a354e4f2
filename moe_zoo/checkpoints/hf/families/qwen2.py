"""Qwen2 and Qwen2.5 (arXiv 2412.15115): dense, biases on q, k, v."""

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, key
from moe_zoo.checkpoints.hf.order import beyond_full, every, windows
from moe_zoo.checkpoints.hf.rope import Rope

FAMILY = Family(
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    keys=(*C.SIZES, C.norm_eps(), C.tied(), key("intermediate_size")),
    parts=(C.Heads(), Rope(), every("dense", windows(beyond_full))),
    fixed={"attention.qkv_bias": True},
    layer={**C.ATTENTION, **C.QKV_BIAS, **C.NORMS, **C.DENSE},
    whole=WHOLE,
)
