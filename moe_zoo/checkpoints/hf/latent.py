"""Multi-head latent attention in config.json and in the files of DeepSeek's models."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.hf.rope import Rope
from moe_zoo.models import ModelConfig

_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

TENSORS = {
    "mixer.q": linear("self_attn.q_proj.weight"),
    "mixer.q_a": linear("self_attn.q_a_proj.weight"),
    "mixer.q_norm.scale": Stored("self_attn.q_a_layernorm.weight"),
    "mixer.q_b": linear("self_attn.q_b_proj.weight"),
    "mixer.kv_a": linear("self_attn.kv_a_proj_with_mqa.weight"),
    "mixer.kv_norm.scale": Stored("self_attn.kv_a_layernorm.weight"),
    "mixer.kv_b": linear("self_attn.kv_b_proj.weight"),
    "mixer.o": linear("self_attn.o_proj.weight", inputs=2),
}


@dataclasses.dataclass(frozen=True)
class Latent:
    """Heads, ranks, and rotary positions, whose YaRN also sharpens the softmax (`mscale_all_dim`)."""

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        paths = {f"attention.latent.{name}": given[name] for name in _SIZES}
        paths["attention.latent.q_lora_rank"] = given.get("q_lora_rank") or 0
        size = given["qk_nope_head_dim"] + given["qk_rope_head_dim"]
        paths |= {"attention.num_attention_heads": given["num_attention_heads"], "attention.head_dim": size}
        paths |= Rope().read({**given, "head_dim": given["qk_rope_head_dim"]})
        rope = {**(given.get("rope_scaling") or {}), **(given.get("rope_parameters") or {})}
        if rope.get("mscale_all_dim") and "attention.rope_scaling" in paths:
            factor = paths["attention.rope_scaling"]["factor"]
            paths["attention.softmax_scale"] = size**-0.5 * _sharpness(factor, rope["mscale_all_dim"]) ** 2
        return paths

    def write(self, config: ModelConfig) -> dict[str, Any]:
        a = config.attention
        c = a.latent
        written = {name: getattr(c, name) for name in _SIZES} | {"q_lora_rank": c.q_lora_rank or None}
        written |= {"num_attention_heads": a.num_attention_heads, "num_key_value_heads": a.num_attention_heads}
        # their class rotates what it calls a head
        rotated = dataclasses.replace(a, head_dim=c.qk_rope_head_dim)
        written |= Rope().write(dataclasses.replace(config, attention=rotated))
        if a.softmax_scale is not None and a.rope_scaling.factor > 1:
            size, factor = c.qk_nope_head_dim + c.qk_rope_head_dim, a.rope_scaling.factor
            mscale = (math.sqrt(a.softmax_scale * math.sqrt(size)) - 1) / (0.1 * math.log(factor))
            for name in ("rope_parameters", "rope_scaling"):
                written[name]["mscale_all_dim"] = round(mscale, 9)
        return written


def _sharpness(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0
