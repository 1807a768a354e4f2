"""DBRX: LayerNorm without biases, queries, keys and values clipped and in one tensor, experts below each other."""

from collections.abc import Mapping
from typing import Any

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import Family, Only, key
from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.hf.order import every
from moe_zoo.checkpoints.hf.rope import Rope
from moe_zoo.checkpoints.native import CheckpointError
from moe_zoo.models import ModelConfig

_ACTIVATIONS = dict(C.ACTIVATIONS)


class _Attention:
    """`attn_config`, and the rotary positions, whose theta is written there in the first release."""

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        a = given.get("attn_config") or {}
        as_usual = {"hidden_size": given["d_model"], "num_attention_heads": given["n_heads"]}
        more = {name: given[name] for name in ("rope_parameters", "rope_scaling", "rope_theta") if name in given}
        paths = Rope().read({"rope_theta": a.get("rope_theta"), **more, **as_usual})
        return paths | {
            "attention.num_attention_heads": given["n_heads"],
            "attention.num_key_value_heads": a.get("kv_n_heads", 1),
            "attention.clip_qkv": a.get("clip_qkv"),
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        N, M, _ = C.heads(config)
        rope = Rope().write(config)
        theta = config.attention.rope_theta
        attention = {"kv_n_heads": M, "clip_qkv": config.attention.clip_qkv, "rope_theta": theta}
        return {"n_heads": N, "attn_config": attention, **rope}


class _Experts:
    """`ffn_config`."""

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        f = given.get("ffn_config") or {}
        act = (f.get("ffn_act_fn") or {}).get("name", "silu")
        norm = f.get("moe_normalize_expert_weights", 1.0)
        if act not in _ACTIVATIONS:
            raise CheckpointError(f"ffn_config.ffn_act_fn: {act!r} is not supported; known: {', '.join(_ACTIVATIONS)}")
        if norm not in (None, 1):
            raise CheckpointError(
                f"ffn_config.moe_normalize_expert_weights: {norm} is not supported; expected 1 or None"
            )
        coef = f.get("moe_loss_weight", 0.01)
        return {
            "experts.activation": _ACTIVATIONS[act],
            "mlp.activation": _ACTIVATIONS[act],
            "moe_intermediate_size": f.get("ffn_hidden_size", 3584),
            "num_experts": f.get("moe_num_experts", 4),
            "router.num_experts_per_tok": f.get("moe_top_k", 1),
            "router.norm_topk_prob": norm is not None,
            "losses": {"load_balance": {"coef": coef}} if coef else {},
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        r = config.router.config
        ours = getattr(config.experts.config, "activation", "silu")
        name = next((theirs for theirs, name in _ACTIVATIONS.items() if name == ours), "silu")
        return {
            "ffn_config": {
                "ffn_act_fn": {"name": name},
                "ffn_hidden_size": config.moe_intermediate_size,
                "moe_num_experts": config.num_experts,
                "moe_top_k": getattr(r, "num_experts_per_tok", 1),
                "moe_normalize_expert_weights": 1.0 if getattr(r, "norm_topk_prob", True) else None,
                "moe_loss_weight": C.BalanceLoss().write(config)["router_aux_loss_coef"],
            }
        }


class _Order:
    """All layers routed."""

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return every("moe").read({"num_hidden_layers": given["n_layers"]})

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"n_layers": every("moe").write(config)["num_hidden_layers"]}


_ATTENTION, _MLP = "norm_attn_norm.attn", "ffn.experts.mlp"

FAMILY = Family(
    model_type="dbrx",
    architectures=("DbrxForCausalLM",),
    keys=(key("vocab_size"), key("d_model", "hidden_size")),
    parts=(_Attention(), _Experts(), _Order(), Only({"tie_word_embeddings": (False,)})),
    fixed={"norm": "layer_no_bias", "norm_eps": 1e-5},
    layer={
        **C.parts(f"{_ATTENTION}.Wqkv.weight", "mixer.q", "mixer.k", "mixer.v"),
        "mixer.o": linear(f"{_ATTENTION}.out_proj.weight", inputs=2),
        "mixer_norm.scale": Stored("norm_attn_norm.norm_1.weight"),
        "ffn_norm.scale": Stored("norm_attn_norm.norm_2.weight"),
        "ffn.router.kernel": linear("ffn.router.layer.weight"),
        "ffn.experts.w_gate": linear(f"{_MLP}.w1", batched=True, stacked=True),
        "ffn.experts.w_up": linear(f"{_MLP}.v1", batched=True, stacked=True),
        "ffn.experts.w_down": Stored(f"{_MLP}.w2", stacked=True),
    },
    whole={
        "embed.table": Stored("transformer.wte.weight"),
        "norm.scale": Stored("transformer.norm_f.weight"),
        "head.kernel": linear("lm_head.weight"),
    },
    prefix="transformer.blocks.{layer}.",
)
