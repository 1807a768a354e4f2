"""Granite 3 MoE, with or without a shared expert: multipliers everywhere, experts stacked on disk, gate above up.

Granite 4 too: layers of Mamba-2 between those of attention, which has no positions, and dense ones without experts.
"""

from typing import Any

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, expand, key
from moe_zoo.checkpoints.hf.layout import linear
from moe_zoo.checkpoints.hf.mamba import NoLimit, tensors
from moe_zoo.checkpoints.hf.order import Given, Layers, every, hybrid
from moe_zoo.checkpoints.hf.rope import Rope
from moe_zoo.models import ModelConfig


def _family(
    model_type: str, architecture: str, keys: tuple, fixed: dict, layer: dict, order: Layers | None = None, parts=()
) -> Family:
    return Family(
        model_type=model_type,
        architectures=(architecture,),
        keys=(
            *C.SIZES,
            C.norm_eps(),
            C.tied(),
            key("intermediate_size", "moe_intermediate_size"),
            key("attention_bias", "attention.qkv_bias", "attention.output_bias", default=False),
            key("embedding_multiplier", default=1.0),
            key("residual_multiplier", default=1.0),
            key("logits_scaling", default=1.0),
            key("attention_multiplier", "attention.softmax_scale", default=1.0),
            key("num_local_experts", "num_experts", default=8),
            key("num_experts_per_tok", "router.num_experts_per_tok", default=2),
            *keys,
        ),
        parts=(C.Heads(), Rope(), order or every("moe"), C.BalanceLoss(), *parts),
        fixed={"router.score_function": "softmax_of_top_k", **fixed},
        layer={
            **C.ATTENTION,
            **C.QKV_BIAS,
            **C.O_BIAS,
            **C.NORMS,
            "ffn.router.kernel": linear("block_sparse_moe.router.layer.weight"),
            "ffn.experts.w_gate": linear("block_sparse_moe.input_linear.weight", batched=True, part=0, parts=2),
            "ffn.experts.w_up": linear("block_sparse_moe.input_linear.weight", batched=True, part=1, parts=2),
            "ffn.experts.w_down": linear("block_sparse_moe.output_linear.weight", batched=True),
            **layer,
        },
        whole=WHOLE,
    )


FAMILY = _family("granitemoe", "GraniteMoeForCausalLM", (), {}, {})


def _shared(ours: str) -> dict:
    return {
        f"{ours}.w_gate": linear("shared_mlp.input_linear.weight", part=0, parts=2),
        f"{ours}.w_up": linear("shared_mlp.input_linear.weight", part=1, parts=2),
        f"{ours}.w_down": linear("shared_mlp.output_linear.weight"),
    }


SHARED = _family(
    "granitemoeshared",
    "GraniteMoeSharedForCausalLM",
    (key("shared_intermediate_size", "shared_expert_size", default=0),),
    {},
    _shared("ffn.shared"),
)


class _Experts:
    """None at all in the dense ones, whose feed-forward part is what else is the shared expert."""

    def read(self, given: Given) -> dict[str, Any]:
        return {
            "num_experts": given.get("num_local_experts", 8) or 1,
            "router.num_experts_per_tok": given.get("num_experts_per_tok", 2) or 1,
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        routed = any(kind.startswith("moe") for kind in expand(config))
        return {"num_local_experts": config.num_experts if routed else 0} | (
            {} if routed else {"num_experts_per_tok": 0, "shared_intermediate_size": config.intermediate_size}
        )


class _Mamba:
    """Sizes of Mamba-2, and whether attention is rotated."""

    def read(self, given: Given) -> dict[str, Any]:
        heads, inner = given.get("mamba_n_heads", 128), given.get("mamba_expand", 2) * given["hidden_size"]
        size = given.get("mamba_d_head", "auto")
        paths = {"mixer.num_heads": heads, "mixer.head_dim": int(inner) // heads if size == "auto" else size}
        if given.get("position_embedding_type") != "rope":
            paths["attention.rotary_dim"] = 0
        return paths

    def write(self, config: ModelConfig) -> dict[str, Any]:
        written = {"position_embedding_type": "nope" if config.attention.rotary_dim == 0 else "rope"}
        if config.mixer.name != "mamba2":
            return written
        heads, size = config.mixer.config.num_heads, config.mixer.config.head_dim
        expand = heads * size / config.hidden_size
        return written | {
            "mamba_n_heads": heads, "mamba_d_head": size, "mamba_expand": int(expand) if expand % 1 == 0 else expand,
        }  # fmt: skip


def _kinds(given: Given, n: int) -> list[str]:
    return ["moe" if given.get("num_local_experts", 8) else "dense"] * n


HYBRID = _family(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    (
        key("shared_intermediate_size", "shared_expert_size", "intermediate_size", default=1024),
        key("rms_norm_eps", "norm_eps", "attention.norm_eps", "mixer.norm_eps", default=1e-6),
        key("mamba_n_groups", "mixer.num_groups", default=1),
        key("mamba_d_state", "mixer.state_size", default=256),
        key("mamba_d_conv", "mixer.conv_kernel", default=4),
        key("mamba_conv_bias", "mixer.conv_bias", default=True),
        key("mamba_proj_bias", "mixer.proj_bias", default=False),
    ),
    {"mixer.name": "mamba2"},
    {**tensors("mamba"), **_shared("ffn.shared"), **_shared("ffn")},
    order=hybrid(Layers(_kinds, lambda kinds: {}), lambda given, i: False),
    parts=(_Experts(), _Mamba(), NoLimit()),
)
