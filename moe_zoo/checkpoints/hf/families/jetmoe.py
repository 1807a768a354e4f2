"""JetMoE (arXiv 2404.07413): queries and outputs of attention are experts too, a bias behind either mixture."""

from collections.abc import Mapping
from typing import Any

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, compress, expand, key
from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.hf.rope import Rope
from moe_zoo.models import ModelConfig

_EPS = 1e-6  # of norms in layers, whatever config.json says: that is the last one's


class _Attention:
    """`num_attention_heads` follows from the heads of keys and the number of experts."""

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        M, K, H = given["num_key_value_heads"], given.get("num_experts_per_tok", 2), given["kv_channels"]
        return Rope().read({**given, "head_dim": H}) | {
            "attention.num_attention_heads": M * K,
            "attention.num_key_value_heads": M,
            "attention.head_dim": H,
            "attention.experts": {"num_experts": given.get("num_local_experts", 8), "num_experts_per_tok": K},
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        N, M, H = C.heads(config)
        return {"num_attention_heads": N, "num_key_value_heads": M, "kv_channels": H, **Rope().write(config)}


class _Order:
    """All layers routed; the variant "layer" has their norms' own epsilon."""

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        eps, n = given.get("rms_norm_eps", _EPS), given["num_hidden_layers"]
        if eps == _EPS:
            return {"norm_eps": eps, "layers": compress(["moe"] * n)}
        return {"norm_eps": eps, "layers": compress(["moe:layer"] * n), "variants": {"layer": {"norm_eps": _EPS}}}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"num_hidden_layers": len(expand(config)), "rms_norm_eps": config.norm_eps}


class _BalanceLoss(C.BalanceLoss):
    """By another name."""

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return super().read({"router_aux_loss_coef": given.get("aux_loss_coef", self.default)})

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"aux_loss_coef": super().write(config)["router_aux_loss_coef"]}


_MLP, _HEADS = "mlp", "self_attention.experts"

FAMILY = Family(
    model_type="jetmoe",
    architectures=("JetMoeForCausalLM",),
    keys=(
        key("vocab_size"),
        key("hidden_size"),
        key("activation_function", "mlp.activation", "experts.activation", default="silu", values=C.ACTIVATIONS),
        C.tied(True),
        key("intermediate_size", "moe_intermediate_size"),
        key("num_local_experts", "num_experts", default=8),
        key("num_experts_per_tok", "router.num_experts_per_tok", default=2),
    ),
    parts=(_Attention(), _Order(), _BalanceLoss(0.01)),
    fixed={"router.score_function": "softmax_of_top_k", "expert_sum_bias": True},
    layer={
        **C.NORMS,
        **C.parts("self_attention.kv_proj.weight", "mixer.k", "mixer.v"),
        "mixer.router": linear(f"{_HEADS}.router.layer.weight"),
        "mixer.q": linear(f"{_HEADS}.input_linear.weight", batched=True),
        "mixer.o": linear(f"{_HEADS}.output_linear.weight", inputs=2, batched=True),
        "mixer.o_bias": Stored(f"{_HEADS}.bias"),
        **C.parts(f"{_MLP}.input_linear.weight", "ffn.experts.w_gate", "ffn.experts.w_up", batched=True),
        "ffn.experts.w_down": linear(f"{_MLP}.output_linear.weight", batched=True),
        "ffn.router.kernel": linear(f"{_MLP}.router.layer.weight"),
        "ffn.sum_bias": Stored(f"{_MLP}.bias"),
    },
    whole=WHOLE,
)
