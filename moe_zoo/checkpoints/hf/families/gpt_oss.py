"""gpt-oss (arXiv 2508.10925): sinks, every second layer a window, biases everywhere, clamped experts in MXFP4.

Read are the four-bit files and the decoded ones; written are the decoded ones.
"""

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, Only, key
from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.hf.mxfp4 import unpack
from moe_zoo.checkpoints.hf.order import every, windows
from moe_zoo.checkpoints.hf.rope import Rope


def _half(name: str, part: int) -> Stored:
    """Gate and up take turns."""
    return Stored(name, part=part, parts=2, interleaved=True)


FAMILY = Family(
    model_type="gpt_oss",
    architectures=("GptOssForCausalLM",),
    keys=(
        key("vocab_size"),
        key("hidden_size"),
        C.norm_eps(default=1e-5),
        C.tied(),
        key("attention_bias", "attention.qkv_bias", "attention.output_bias", default=True),
        key("intermediate_size", "moe_intermediate_size"),
        key("swiglu_limit", "experts.clamp", default=7.0),
        key("num_local_experts", "num_experts", default=128),
        key("num_experts_per_tok", "router.num_experts_per_tok", default=4, also=("experts_per_token",)),
    ),
    parts=(
        C.Heads(kv=8, size=64),
        Rope(150_000.0),
        every("moe", windows(lambda given, i: i % 2 == 0, switched=False)),
        C.BalanceLoss(),
        Only({"hidden_act": ("silu",), "swiglu_alpha": (1.702,)}),
    ),
    fixed={
        "attention.sinks": True,
        "router.score_function": "softmax_of_top_k",
        "router.linear_bias": True,
        "experts.activation": "quick_gelu",
        "experts.up_shift": 1.0,
        "experts.bias": True,
    },
    layer={
        **C.ATTENTION,
        **C.QKV_BIAS,
        **C.O_BIAS,
        **C.NORMS,
        "mixer.sinks": Stored("self_attn.sinks"),
        "ffn.router.kernel": linear("mlp.router.weight"),
        "ffn.router.bias": Stored("mlp.router.bias"),
        "ffn.experts.w_gate": _half("mlp.experts.gate_up_proj", 0),
        "ffn.experts.w_up": _half("mlp.experts.gate_up_proj", 1),
        "ffn.experts.w_down": Stored("mlp.experts.down_proj"),
        "ffn.experts.b_gate": _half("mlp.experts.gate_up_proj_bias", 0),
        "ffn.experts.b_up": _half("mlp.experts.gate_up_proj_bias", 1),
        "ffn.experts.b_down": Stored("mlp.experts.down_proj_bias"),
    },
    whole=WHOLE,
    unpack=unpack,
)
