"""NLLB-MoE (arXiv 2207.04672): an encoder and a decoder with two experts per token, sines for positions, biases."""

from collections.abc import Mapping
from typing import Any

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import Family, Only, key
from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.hf.pairs import PARTS, PairOrder, RouterLosses
from moe_zoo.checkpoints.native import CheckpointError
from moe_zoo.models import EncoderDecoderConfig, ModelConfig

Given = Mapping[str, Any]
#: `second_expert_policy` -> (threshold of the gate from which on it is always taken, whether it is drawn)
_POLICIES = {"all": (0.0, False), "random": (0.5, False), "sampling": (0.0, True)}


class _Sizes:
    """Heads and widths, which the parts may have different; the decoder's are the model's."""

    def read(self, given: Given) -> dict[str, Any]:
        found = {}
        for part in PARTS:
            at = "" if part == "decoder" else "encoder."
            found[f"{at}attention.num_attention_heads"] = given.get(f"{part}_attention_heads", 16)
            for name in ("intermediate_size", "moe_intermediate_size"):
                found[f"{at}{name}"] = given.get(f"{part}_ffn_dim", 4096)
        return found

    def write(self, config: ModelConfig) -> dict[str, Any]:
        written = {}
        for part, settings in zip(PARTS, (config.encoder_config(), config)):
            written[f"{part}_attention_heads"] = settings.attention.num_attention_heads
            routed = "moe" in settings.layers
            written[f"{part}_ffn_dim"] = settings.moe_intermediate_size if routed else settings.intermediate_size
        return written


class _Embedding:
    """Multiplied by the root of the width; positions begin behind the id of padding, which had that row."""

    def read(self, given: Given) -> dict[str, Any]:
        D = given.get("d_model", given.get("hidden_size", 1024))
        pad = given.get("pad_token_id", 1)
        if not isinstance(pad, int):
            raise CheckpointError(f"pad_token_id: expected an id, which positions are counted from, got {pad!r}")
        scaled = given.get("scale_embedding", True)
        return {"position_offset": pad + 1, "embedding_multiplier": D**0.5 if scaled else 1.0}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"pad_token_id": config.position_offset - 1, "scale_embedding": config.embedding_multiplier != 1.0}


class _SecondExpert:
    """Their class draws also outside training; here the better one is taken then."""

    def read(self, given: Given) -> dict[str, Any]:
        policy = given.get("second_expert_policy", "all")
        if policy not in _POLICIES:
            raise CheckpointError(f"second_expert_policy: {policy!r} is not supported; known: {', '.join(_POLICIES)}")
        threshold, sampled = _POLICIES[policy]
        return {"router.second_threshold": threshold, "router.nllb.sampled_second": sampled}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        router = config.router.config
        sampled = getattr(getattr(router, "nllb", None), "sampled_second", False)
        now = getattr(router, "second_threshold", 0.0), sampled
        return {"second_expert_policy": next((name for name, how in _POLICIES.items() if how == now), "all")}


def _affine(theirs: str, ours: str, inputs: int = 1, bias: str = "") -> dict[str, Stored]:
    """A matrix and its bias; `bias`: our name of that."""
    return {ours: linear(f"{theirs}.weight", inputs=inputs), bias or f"{ours}_bias": Stored(f"{theirs}.bias")}


def _norm(theirs: str, ours: str) -> dict[str, Stored]:
    return {f"{ours}.scale": Stored(f"{theirs}.weight"), f"{ours}.bias": Stored(f"{theirs}.bias")}


def _attention(theirs: str, ours: str) -> dict[str, Stored]:
    tables = (_affine(f"{theirs}.{x}_proj", f"{ours}.{x}") for x in "qkv")
    out = _affine(f"{theirs}.out_proj", f"{ours}.o", inputs=2)
    return {name: stored for table in (*tables, out) for name, stored in table.items()}


def _network(theirs: str, ours: str) -> dict[str, Stored]:
    return {
        **_affine(f"{theirs}.fc1", f"{ours}.w_up", bias=f"{ours}.b_up"),
        **_affine(f"{theirs}.fc2", f"{ours}.w_down", bias=f"{ours}.b_down"),
    }


_LAYER = {
    **_attention("self_attn", "mixer"),
    **_norm("self_attn_layer_norm", "mixer_norm"),
    **_norm("ff_layer_norm", "ffn_norm"),
    **_network("ffn", "ffn"),
    **_network("ffn.experts.expert_{e}", "ffn.experts"),
    "ffn.router.kernel": linear("ffn.router.classifier.weight"),
}

FAMILY = Family(
    model_type="nllb-moe",
    architectures=("NllbMoeForConditionalGeneration",),
    settings=EncoderDecoderConfig,
    keys=(
        key("vocab_size", default=128112),
        key("d_model", "hidden_size", default=1024, also=("hidden_size",)),
        key("activation_function", "mlp.activation", "experts.activation", default="relu", values=C.ACTIVATIONS),
        key("num_experts", default=128),
        key("expert_capacity", "router.nllb.expert_capacity", default=64),
        key("moe_eval_capacity_token_fraction", "router.nllb.eval_capacity_fraction", default=1.0),
        key("batch_prioritized_routing", "router.nllb.batch_prioritized", default=False),
        key("normalize_router_prob_before_dropping", "router.nllb.normalize_before_dropping", default=False),
        key("moe_token_dropout", "router.nllb.output_masking", default=0.2),
        C.tied(True),
    ),
    parts=(
        PairOrder(
            count={"encoder": "encoder_layers", "decoder": "decoder_layers"},
            default=12,
            is_routed=lambda i, step: (i + 1) % step == 0,
            step=lambda given, part, n: given.get(f"{part}_sparse_step", 4),
        ),
        _Sizes(),
        _Embedding(),
        _SecondExpert(),
        RouterLosses(),
        Only({"router_bias": (False,), "router_dtype": ("float32",), "router_ignore_padding_tokens": (False,)}),
    ),
    fixed={
        "positions": "sinusoidal",
        "norm": "layer",
        "norm_eps": 1e-5,
        "attention.rotary_dim": 0,
        "attention.qkv_bias": True,
        "attention.output_bias": True,
        "mlp.gated": False,
        "mlp.bias": True,
        "experts.gated": False,
        "experts.bias": True,
        "router.name": "gshard",
    },
    layer={
        **_LAYER,
        **_attention("cross_attention", "cross"),
        **_norm("cross_attention_layer_norm", "cross_norm"),
    },
    prefix="model.decoder.layers.{layer}.",
    encoder_layer=_LAYER,
    encoder_prefix="model.encoder.layers.{layer}.",
    whole={
        "embed.table": Stored("model.shared.weight"),
        **_norm("model.encoder.layer_norm", "encoder.norm"),
        **_norm("model.decoder.layer_norm", "norm"),
        "head.kernel": linear("lm_head.weight"),
    },
    unused=(r"model\.(encoder|decoder)\.embed_tokens\.weight", r"model\.(encoder|decoder)\.embed_positions\.weights"),
)
