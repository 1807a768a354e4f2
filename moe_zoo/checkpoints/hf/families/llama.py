"""Llama 1 to 3 and the many that share its class: dense, no biases unless asked for."""

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, Only, key
from moe_zoo.checkpoints.hf.order import every
from moe_zoo.checkpoints.hf.rope import Rope

FAMILY = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    keys=(
        *C.SIZES,
        C.norm_eps(),
        C.tied(),
        key("intermediate_size"),
        key("attention_bias", "attention.qkv_bias", "attention.output_bias", default=False),
        key("mlp_bias", "mlp.bias", default=False),
    ),
    parts=(C.Heads(), Rope(), every("dense"), Only({"pretraining_tp": (1, None)})),
    fixed={},
    layer={**C.ATTENTION, **C.QKV_BIAS, **C.O_BIAS, **C.NORMS, **C.DENSE, **C.DENSE_BIAS},
    whole=WHOLE,
    unused=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
