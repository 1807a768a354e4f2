"""AFMoE (Arcee's Trinity): gated attention, rotation only within windows, norms on both sides of a branch."""

import math
from collections.abc import Mapping
from typing import Any

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, Only, key
from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.hf.order import dense_first, windows
from moe_zoo.checkpoints.hf.rope import Rope
from moe_zoo.models import ModelConfig


class _Mup:
    """`mup_enabled`: embeddings times the root of the width."""

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"embedding_multiplier": math.sqrt(given["hidden_size"]) if given.get("mup_enabled") else 1.0}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"mup_enabled": config.embedding_multiplier != 1.0}


FAMILY = Family(
    model_type="afmoe",
    architectures=("AfmoeForCausalLM",),
    keys=(
        *C.SIZES,
        C.norm_eps(default=1e-5),
        C.tied(),
        key("intermediate_size"),
        key("moe_intermediate_size"),
        key("attention_bias", "attention.qkv_bias", "attention.output_bias", default=False),
        key("num_experts", default=64),
        key("num_experts_per_tok", "router.num_experts_per_tok", default=6),
        key("route_scale", "router.routed_scaling_factor", default=1.0),
    ),
    parts=(
        C.Heads(size=128),
        Rope(),
        dense_first(
            windows(lambda given, i: (i + 1) % (given.get("global_attn_every_n_layers") or 4) != 0, switched=False),
            default=1,
            name="num_dense_layers",
            far=lambda given: {"rotary_dim": 0},
        ),
        C.SharedExperts(2, "num_shared_experts"),
        C.NoLoss(),
        _Mup(),
        Only({"score_func": ("sigmoid",), "route_norm": (True,), "n_group": (1, None), "topk_group": (1, None)}),
    ),
    fixed={
        "attention.qk_norm": "head",
        "attention.output_gate": True,
        "norm_placement": "both",
        "router.score_function": "sigmoid",
        "router.correction_bias": True,
        "router.norm_topk_prob": True,
    },
    layer={
        **C.ATTENTION,
        **C.QKV_BIAS,
        **C.O_BIAS,
        **C.QK_NORM,
        **C.DENSE,
        **C.EXPERTS,
        **C.gated("ffn.shared", "mlp.shared_experts"),
        "mixer.gate": linear("self_attn.gate_proj.weight"),
        "mixer_norm.scale": Stored("input_layernorm.weight"),
        "mixer_post_norm.scale": Stored("post_attention_layernorm.weight"),
        "ffn_norm.scale": Stored("pre_mlp_layernorm.weight"),
        "ffn_post_norm.scale": Stored("post_mlp_layernorm.weight"),
        "ffn.router.kernel": linear("mlp.router.gate.weight"),
        "ffn.router.correction": Stored("mlp.expert_bias"),
    },
    whole=WHOLE,
)
