"""Llama 4, the text model: gates on the input of experts, attention in chunks, every fourth layer without positions."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, compress, expand, key
from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.hf.order import Given
from moe_zoo.checkpoints.hf.rope import Rope
from moe_zoo.checkpoints.native import CheckpointError
from moe_zoo.models import ModelConfig

_FAR = ":far"


class _Order:
    """Layers that turn heads see a chunk; the others, the variant "far", see all, at a temperature of their own."""

    def read(self, given: Given) -> dict[str, Any]:
        n = given["num_hidden_layers"]
        chunk, turns = given.get("attention_chunk_size", 8192), self._turns(given, n)
        expected = ["chunked_attention" if t and chunk else "full_attention" for t in turns]
        if given.get("layer_types") not in (None, expected):
            raise CheckpointError("layer_types: only layers with rotary positions can be chunked, and all of them")
        routed = given.get("moe_layers")
        if routed is None:
            step = given.get("interleave_moe_layer_step", 1)
            routed = range(step - 1, n, step)
        kinds = ["moe" if i in routed else "dense" for i in range(n)]
        kinds = [kind + _FAR * (not turn) for kind, turn in zip(kinds, turns)]
        normed = given.get("use_qk_norm", True)
        paths = {
            "layers": compress(kinds),
            "attention.chunk_size": chunk,
            "attention.qk_norm": "unscaled" if normed else "none",
            "attention.qk_norm_after_rope": normed,
        }
        if all(turns):
            return paths
        far = {"rotary_dim": 0, "chunk_size": None, "qk_norm": "none", "qk_norm_after_rope": False}
        if given.get("attn_temperature_tuning", True):
            far |= {"temperature_scale": given.get("attn_scale", 0.1)}
            far |= {"temperature_floor": given.get("floor_scale", 8192)}
        return paths | {"variants": {"far": {"attention": far}}}

    def _turns(self, given: Given, n: int) -> list[bool]:
        rotary = given.get("no_rope_layers") or None  # where 1 means: with
        if rotary is None:
            every = given.get("no_rope_layer_interval", 4)
            return [(i + 1) % every != 0 for i in range(n)]
        if not isinstance(rotary, list) or len(rotary) < n:
            raise CheckpointError(f"no_rope_layers: expected one of each of {n} layers")
        return [bool(r) for r in rotary[:n]]

    def write(self, config: ModelConfig) -> dict[str, Any]:
        kinds, a = expand(config), config.attention
        far = config.variants.get("far", {}).get("attention", {})
        turns = [not kind.endswith(_FAR) for kind in kinds]
        return {
            "num_hidden_layers": len(kinds),
            "moe_layers": [i for i, kind in enumerate(kinds) if kind.startswith("moe")],
            "no_rope_layers": [int(t) for t in turns],
            "layer_types": ["chunked_attention" if t and a.chunk_size else "full_attention" for t in turns],
            "attention_chunk_size": a.chunk_size,
            "use_qk_norm": a.qk_norm == "unscaled",
            "attn_temperature_tuning": bool(far.get("temperature_scale")),
            "attn_scale": far.get("temperature_scale", 0.1),
            "floor_scale": far.get("temperature_floor", 8192),
        }


class _Shared:
    """The shared expert is as wide as a routed one."""

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"shared_expert_size": given["intermediate_size"]}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {}


FAMILY = Family(
    model_type="llama4_text",
    architectures=("Llama4ForCausalLM",),
    keys=(
        *C.SIZES,
        C.norm_eps(default=1e-5),
        C.tied(),
        key("intermediate_size", "moe_intermediate_size"),
        key("intermediate_size_mlp", "intermediate_size", default=16384),
        key("attention_bias", "attention.qkv_bias", "attention.output_bias", default=False),
        key("num_local_experts", "num_experts", default=16),
        key("num_experts_per_tok", "router.num_experts_per_tok", default=1),
    ),
    parts=(C.Heads(kv=8, size=128), Rope(500_000.0), _Order(), _Shared(), C.BalanceLoss()),
    fixed={
        "attention.rope_interleaved": True,
        "router.score_function": "sigmoid",
        "router.norm_topk_prob": False,
        "dispatch": {"name": "dropless", "gate_on": "input"},
    },
    layer={
        **C.ATTENTION,
        **C.QKV_BIAS,
        **C.O_BIAS,
        **C.NORMS,
        **C.gated("ffn", "feed_forward"),
        **C.gated("ffn.shared", "feed_forward.shared_expert"),
        "ffn.router.kernel": linear("feed_forward.router.weight"),
        "ffn.experts.w_gate": Stored("feed_forward.experts.gate_up_proj", part=0, parts=2),
        "ffn.experts.w_up": Stored("feed_forward.experts.gate_up_proj", part=1, parts=2),
        "ffn.experts.w_down": Stored("feed_forward.experts.down_proj"),
    },
    whole=WHOLE,
)


@dataclasses.dataclass(frozen=True)
class _InText(Family):
    """The same inside a model that also sees: settings in `text_config`, what sees is left out."""

    def read(self, given: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        if not isinstance(given.get("text_config"), Mapping):
            raise CheckpointError(f"{where}: it has no 'text_config'")
        return FAMILY.read(given["text_config"], f"{where}, text_config")


_LANGUAGE = "language_model."
WITH_VISION = _InText(
    model_type="llama4",
    architectures=("Llama4ForConditionalGeneration",),
    keys=(),
    parts=(),
    fixed={},
    layer=FAMILY.layer,
    whole={name: dataclasses.replace(stored, name=_LANGUAGE + stored.name) for name, stored in WHOLE.items()},
    unused=(r"vision_model\..*", r"multi_modal_projector\..*"),
    prefix=_LANGUAGE + FAMILY.prefix,
    written_as=FAMILY,
)
