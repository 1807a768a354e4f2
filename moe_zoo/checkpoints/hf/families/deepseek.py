"""DeepSeekMoE-16B (arXiv 2401.06066): raw softmax gates, shared experts, a dense first layer."""

from typing import Any

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, Only, key
from moe_zoo.checkpoints.hf.layout import linear
from moe_zoo.checkpoints.hf.order import Given, Layers
from moe_zoo.checkpoints.hf.rope import Rope
from moe_zoo.checkpoints.native import CheckpointError
from moe_zoo.models import ModelConfig


def _kinds(given: Given, n: int) -> list[str]:
    first, step = given.get("first_k_dense_replace", 0), given.get("moe_layer_freq", 1)
    routed = given.get("n_routed_experts") is not None
    return ["moe" if routed and i >= first and i % step == 0 else "dense" for i in range(n)]


def _back(kinds: list[str]) -> dict[str, Any]:
    routed = [i for i, kind in enumerate(kinds) if kind == "moe"]
    step = routed[1] - routed[0] if len(routed) > 1 else 1
    return {"first_k_dense_replace": routed[0] if routed else len(kinds), "moe_layer_freq": step}


class _Heads:
    """As large as the hidden size divides into: the class knows no other size."""

    def read(self, given: Given) -> dict[str, Any]:
        return {
            "attention.num_attention_heads": given["num_attention_heads"],
            "attention.num_key_value_heads": given.get("num_key_value_heads"),
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        N, M, _ = C.heads(config)
        return {"num_attention_heads": N, "num_key_value_heads": M}


class _Rope(Rope):
    """Of all stretches the class has but one of ours, under the name of its time."""

    def read(self, given: Given) -> dict[str, Any]:
        paths = super().read(given)
        kind = paths.get("attention.rope_scaling", {"kind": "linear"})["kind"]
        if kind != "linear":
            raise CheckpointError(f"rope_scaling: {kind!r} is not supported; expected null or linear")
        return paths

    def write(self, config: ModelConfig) -> dict[str, Any]:
        written = super().write(config)
        scaling = written.get("rope_scaling")
        return written | {"rope_scaling": scaling and {"type": scaling["rope_type"], **scaling}}


class _Experts:
    """Gates are renormalised only where a token has several experts; none shared is null, not 0."""

    def read(self, given: Given) -> dict[str, Any]:
        K = given.get("num_experts_per_tok") or 1
        return {
            "num_experts": given.get("n_routed_experts") or 1,
            "router.num_experts_per_tok": K,
            "router.norm_topk_prob": bool(given.get("norm_topk_prob", False)) and K > 1,
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        names, router = ("num_experts_per_tok", "norm_topk_prob"), config.router.config
        written = {name: getattr(router, name) for name in names if hasattr(router, name)}
        shared = C.SharedExperts().write(config)["n_shared_experts"]
        return written | {"n_routed_experts": config.num_experts, "n_shared_experts": shared or None}


class _BalanceLoss:
    """Within each sequence, unless `seq_aux` says otherwise."""

    def read(self, given: Given) -> dict[str, Any]:
        coef = given.get("aux_loss_alpha", 0.001)
        over = "sequence" if given.get("seq_aux", True) else "micro"
        return {"losses": {"load_balance": {"coef": coef, "over": over}} if coef else {}}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        losses = [chosen.config for chosen in config.losses if chosen.name == "load_balance"]
        alpha = losses[0].coef if losses else 0.0
        return {"aux_loss_alpha": alpha, "seq_aux": not losses or losses[0].over == "sequence"}


FAMILY = Family(
    model_type="deepseek",
    architectures=("DeepseekForCausalLM",),
    keys=(
        *C.SIZES,
        C.norm_eps(),
        C.tied(),
        key("attention_bias", "attention.qkv_bias", "attention.output_bias", default=False),
        key("intermediate_size"),
        key("moe_intermediate_size"),
    ),
    parts=(
        _Heads(),
        _Rope(),
        Layers(_kinds, _back),
        C.SharedExperts(),
        _Experts(),
        _BalanceLoss(),
        Only({"scoring_func": ("softmax",)}),
    ),
    fixed={},
    layer={
        **C.ATTENTION,
        **C.QKV_BIAS,
        **C.O_BIAS,
        **C.NORMS,
        **C.DENSE,
        **C.EXPERTS,
        **C.gated("ffn.shared", "mlp.shared_experts"),
        "ffn.router.kernel": linear("mlp.gate.weight"),
    },
    whole=WHOLE,
)
