"""Flex-OLMo (arXiv 2507.07024): OLMoE's routing on OLMo 2's block, norms behind the branches."""

from collections.abc import Mapping
from typing import Any

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, key
from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.hf.order import every
from moe_zoo.checkpoints.hf.rope import Rope
from moe_zoo.models import ModelConfig


class _SpecialTokens:
    """The class's own lie at the end of its vocabulary: beyond that of a smaller model."""

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {} if config.vocab_size > _LAST_TOKEN else {"pad_token_id": None, "eos_token_id": None}


_LAST_TOKEN = 100_277

FAMILY = Family(
    model_type="flex_olmo",
    architectures=("FlexOlmoForCausalLM",),
    keys=(
        *C.SIZES,
        C.norm_eps(),
        C.tied(),
        key("attention_bias", "attention.qkv_bias", "attention.output_bias", default=False),
        key("intermediate_size", "moe_intermediate_size"),
        key("num_experts", default=7, also=("num_local_experts",)),
        key("num_experts_per_tok", "router.num_experts_per_tok", default=5),
        key("norm_topk_prob", "router.norm_topk_prob", default=False),
    ),
    parts=(C.Heads(), Rope(500_000.0), every("moe"), C.BalanceLoss(0.01), _SpecialTokens()),
    fixed={"attention.qk_norm": "full", "norm_placement": "post"},
    layer={
        **C.ATTENTION,
        **C.QKV_BIAS,
        **C.O_BIAS,
        **C.QK_NORM,
        **C.EXPERTS,
        "mixer_norm.scale": Stored("post_attention_layernorm.weight"),
        "ffn_norm.scale": Stored("post_feedforward_layernorm.weight"),
        "ffn.router.kernel": linear("mlp.gate.weight"),
    },
    whole=WHOLE,
)
