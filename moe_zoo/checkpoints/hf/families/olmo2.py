"""OLMo 2 (arXiv 2501.00656): dense, norms behind the branches, query-key norm over the full width."""

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, key
from moe_zoo.checkpoints.hf.layout import Stored
from moe_zoo.checkpoints.hf.order import every
from moe_zoo.checkpoints.hf.rope import Rope

FAMILY = Family(
    model_type="olmo2",
    architectures=("Olmo2ForCausalLM",),
    keys=(
        *C.SIZES,
        C.norm_eps(default=1e-5),
        C.tied(),
        key("intermediate_size"),
        key("attention_bias", "attention.qkv_bias", "attention.output_bias", default=False),
    ),
    parts=(C.Heads(), Rope(), every("dense")),
    fixed={"attention.qk_norm": "full", "norm_placement": "post"},
    layer={
        **C.ATTENTION,
        **C.QKV_BIAS,
        **C.O_BIAS,
        **C.QK_NORM,
        **C.DENSE,
        "mixer_norm.scale": Stored("post_attention_layernorm.weight"),
        "ffn_norm.scale": Stored("post_feedforward_layernorm.weight"),
    },
    whole=WHOLE,
)
