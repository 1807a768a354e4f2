"""Switch Transformers (arXiv 2101.03961): T5's encoder and decoder, one expert per token, so many places per row."""

from collections.abc import Mapping
from typing import Any

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import Family, Only, key
from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.hf.pairs import PairOrder, RouterLosses
from moe_zoo.models import EncoderDecoderConfig, ModelConfig


def _step(given: Mapping[str, Any], part: str, n: int) -> int:
    """Their class's count, unless the file says it; with no sparse layers the step is n, which makes layer 1 one."""
    sparse = given.get(f"num_sparse_{part}_layers", 3)
    return given.get(f"{part}_sparse_step", n // sparse if sparse > 0 else n)


class _TiedHead:
    """A head that is the embedding sees what it sees divided by the root of the width."""

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        D = given.get("d_model", given.get("hidden_size", 768))
        return {"logits_scaling": D**0.5 if given.get("tie_word_embeddings", True) else 1.0}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"decoder_start_token_id": 0}  # padding begins a text, as in T5


def _attention(theirs: str, ours: str) -> dict[str, Stored]:
    names = {x: linear(f"{theirs}.{x}.weight", inputs=2 if x == "o" else 1) for x in "qkvo"}
    return {f"{ours}.{x}": stored for x, stored in names.items()}


def _layer(ffn: str) -> dict[str, Stored]:
    """Self-attention, and the feed-forward part, which is the sublayer `ffn`."""
    return {
        **_attention("layer.0.SelfAttention", "mixer"),
        "mixer_norm.scale": Stored("layer.0.layer_norm.weight"),
        "ffn_norm.scale": Stored(f"{ffn}.layer_norm.weight"),
        "ffn.w_up": linear(f"{ffn}.mlp.wi.weight"),
        "ffn.w_down": linear(f"{ffn}.mlp.wo.weight"),
        "ffn.router.kernel": linear(f"{ffn}.mlp.router.classifier.weight"),
        "ffn.experts.w_up": linear(f"{ffn}.mlp.experts.expert_{{e}}.wi.weight"),
        "ffn.experts.w_down": linear(f"{ffn}.mlp.experts.expert_{{e}}.wo.weight"),
    }


_BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"

FAMILY = Family(
    model_type="switch_transformers",
    architectures=("SwitchTransformersForConditionalGeneration",),
    settings=EncoderDecoderConfig,
    keys=(
        key("vocab_size", default=32128),
        key("d_model", "hidden_size", default=768, also=("hidden_size",)),
        key("num_heads", "attention.num_attention_heads", default=12, also=("num_attention_heads",)),
        key("d_kv", "attention.head_dim", default=64),
        key("d_ff", "intermediate_size", "moe_intermediate_size", default=2048),
        key("dense_act_fn", "mlp.activation", "experts.activation", default="relu", values=C.ACTIVATIONS),
        key("num_experts", default=8),
        key("expert_capacity", "dispatch.expert_capacity", default=64),
        key("router_jitter_noise", "router.jitter", default=0.01),
        key("relative_attention_num_buckets", "relative_buckets", default=32),
        key("relative_attention_max_distance", "relative_max_distance", default=128),
        C.norm_eps("layer_norm_epsilon"),
        C.tied(True),
    ),
    parts=(
        PairOrder(
            count={"encoder": "num_layers", "decoder": "num_decoder_layers"},
            default=12,
            is_routed=lambda i, step: step == 1 or i % step == 1,
            step=_step,
            more=lambda part, kinds: {f"num_sparse_{part}_layers": kinds.count("moe")},
        ),
        _TiedHead(),
        RouterLosses(),
        Only({"router_bias": (False,), "router_dtype": ("float32",)}),
    ),
    fixed={
        "positions": "relative",
        "attention.rotary_dim": 0,
        "attention.softmax_scale": 1.0,
        "mlp.gated": False,
        "experts.gated": False,
        "router.name": "switch",
        "dispatch.name": "capacity",
        "dispatch.group": "sequence",
    },
    layer={
        **_layer("layer.2"),
        **_attention("layer.1.EncDecAttention", "cross"),
        "cross_norm.scale": Stored("layer.1.layer_norm.weight"),
    },
    prefix="decoder.block.{layer}.",
    encoder_layer=_layer("layer.1"),
    encoder_prefix="encoder.block.{layer}.",
    whole={
        "embed.table": Stored("shared.weight"),
        "encoder.norm.scale": Stored("encoder.final_layer_norm.weight"),
        "norm.scale": Stored("decoder.final_layer_norm.weight"),
        "encoder.relative.table": Stored(f"encoder.{_BIAS}"),
        "relative.table": Stored(f"decoder.{_BIAS}"),
        "head.kernel": linear("lm_head.weight"),
    },
    # the embedding again; and what early files have of T5, which no layer looks at
    unused=(
        r"(encoder|decoder)\.embed_tokens\.weight",
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ),
)
