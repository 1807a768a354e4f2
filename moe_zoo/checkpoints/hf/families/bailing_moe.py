"""Ling and Ring (arXiv 2503.05139): softmax routing in version 1; groups, a bias and half-rotary heads in version 2."""

from collections.abc import Mapping
from typing import Any

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import Family, Only, key
from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.hf.order import dense_first
from moe_zoo.checkpoints.hf.rope import Rope

_LAYER = {
    **C.parts("attention.query_key_value.weight", "mixer.q", "mixer.k", "mixer.v"),
    **{f"mixer.{x}_bias": Stored("attention.query_key_value.bias", part=i, parts=3) for i, x in enumerate("qkv")},
    "mixer.o": linear("attention.dense.weight", inputs=2),
    "mixer.o_bias": Stored("attention.dense.bias"),
    **C.NORMS,
    **C.DENSE,
    **C.EXPERTS,
    **C.gated("ffn.shared", "mlp.shared_experts"),
    "ffn.router.kernel": linear("mlp.gate.weight"),
}
_WHOLE = {
    "embed.table": Stored("model.word_embeddings.weight"),
    "norm.scale": Stored("model.norm.weight"),
    "head.kernel": linear("lm_head.weight"),
}


def _family(
    model_type: str, architecture: str, keys: tuple, parts: tuple, fixed: Mapping[str, Any], layer: dict
) -> Family:
    return Family(
        model_type=model_type,
        architectures=(architecture,),
        keys=(
            *C.SIZES,
            C.norm_eps(),
            C.tied(),
            key("intermediate_size"),
            key("moe_intermediate_size"),
            key("use_qkv_bias", "attention.qkv_bias", default=False),
            key("use_bias", "attention.output_bias", default=False),
            key("num_experts"),
            key("num_experts_per_tok", "router.num_experts_per_tok"),
            *keys,
        ),
        parts=(C.Heads(), *parts, dense_first(), C.SharedExperts(0, "num_shared_experts"), C.NoLoss()),
        fixed=fixed,
        layer={**_LAYER, **layer},
        whole=_WHOLE,
        extra_layers=True,
    )


FAMILY = _family(
    "bailing_moe",
    "BailingMoeForCausalLM",
    (key("norm_topk_prob", "router.norm_topk_prob", default=True),),
    (Rope(), Only({"norm_head": (False,), "norm_softmax": (False,), "use_qk_norm": (False,)})),
    {},
    {},
)
V2 = _family(
    "bailing_moe_v2",
    "BailingMoeV2ForCausalLM",
    (
        key("n_group", "router.n_group", default=8),
        key("topk_group", "router.topk_group", default=4),
        key("routed_scaling_factor", "router.routed_scaling_factor", default=2.5),
    ),
    (
        Rope(),
        Only(
            {
                "norm_head": (False,), "use_qk_norm": (True,), "score_function": ("sigmoid", None),
                "norm_topk_prob": (True,), "moe_router_enable_expert_bias": (True,),
            }
        ),
    ),
    {"attention.qk_norm": "head", "router.norm_topk_prob": True, **C.V3_ROUTER},
    {
        "mixer.q_norm.scale": Stored("attention.query_layernorm.weight"),
        "mixer.k_norm.scale": Stored("attention.key_layernorm.weight"),
        "ffn.router.correction": Stored("mlp.gate.expert_bias"),
    },
)  # fmt: skip
