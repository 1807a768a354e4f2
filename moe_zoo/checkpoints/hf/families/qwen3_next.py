"""Qwen3-Next: three layers of Gated DeltaNet to one of gated attention, gates renormalised, a gated shared expert."""

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, Only, key
from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.hf.order import hybrid, sparse_step
from moe_zoo.checkpoints.hf.rope import Rope

KEYS = (
    *C.SIZES,
    key("rms_norm_eps", "norm_eps", "attention.norm_eps", "mixer.norm_eps", default=1e-6),
    C.tied(),
    key("moe_intermediate_size", default=512),
    key("shared_expert_intermediate_size", "shared_expert_size", default=512),
    key("linear_conv_kernel_dim", "mixer.conv_kernel", default=4),
    key("linear_key_head_dim", "mixer.key_head_dim", default=128),
    key("linear_value_head_dim", "mixer.value_head_dim", default=128),
    key("linear_num_key_heads", "mixer.num_key_heads", default=16),
    key("linear_num_value_heads", "mixer.num_value_heads", default=32),
)
FIXED = {
    "mixer.name": "gated_delta_net",
    "norm": "rms_plus_one",
    "attention.qk_norm": "head",
    "attention.qk_norm_kind": "rms_plus_one",
    "attention.output_gate": True,
    "shared_expert_gate": True,
}
LAYER = {
    **C.ATTENTION,
    **C.QK_NORM,
    "mixer.q": linear("self_attn.q_proj.weight", part=0, parts=2, by_head=True),
    "mixer.gate": linear("self_attn.q_proj.weight", part=1, parts=2, by_head=True),
    "mixer.conv": Stored("linear_attn.conv1d.weight", "conv"),
    "mixer.dt_bias": Stored("linear_attn.dt_bias"),
    "mixer.A_log": Stored("linear_attn.A_log"),
    "mixer.norm.scale": Stored("linear_attn.norm.weight"),
    "mixer.out": linear("linear_attn.out_proj.weight", inputs=2),
    **C.NORMS,
    **C.EXPERTS,
    **C.gated("ffn.shared", "mlp.shared_expert"),
    "ffn.shared_gate": linear("mlp.shared_expert_gate.weight"),
    "ffn.router.kernel": linear("mlp.gate.weight"),
}


def is_full(given, i: int) -> bool:
    """Whether a layer has attention where no list says so."""
    return (i + 1) % given.get("full_attention_interval", 4) == 0


FAMILY = Family(
    model_type="qwen3_next",
    architectures=("Qwen3NextForCausalLM",),
    keys=(
        *KEYS,
        key("intermediate_size", default=5632),
        key("num_experts", default=512),
        key("num_experts_per_tok", "router.num_experts_per_tok", default=10),
        key("norm_topk_prob", "router.norm_topk_prob", default=True),
    ),
    parts=(
        C.Heads(kv=2, size=256),
        Rope(partial=0.25),
        hybrid(sparse_step(), is_full),
        C.BalanceLoss(),
        Only({"attention_bias": (False,)}),
    ),
    fixed=FIXED | {"mixer.projections": "grouped"},
    layer={
        **LAYER,
        **C.DENSE,
        "mixer.in_qkvz": linear("linear_attn.in_proj_qkvz.weight"),
        "mixer.in_ba": linear("linear_attn.in_proj_ba.weight"),
    },
    whole=WHOLE,
    unused=(r"mtp.*",),
)
