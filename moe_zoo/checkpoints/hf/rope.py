"""Rotary positions in config.json: `rope_parameters` of today, `rope_theta` and `rope_scaling` of before."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from moe_zoo.checkpoints.hf.common import heads
from moe_zoo.checkpoints.native import CheckpointError
from moe_zoo.models import ModelConfig

_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "original_max_position_embeddings",
    ),
    "longrope": ("factor", "short_factor", "long_factor", "attention_factor", "original_max_position_embeddings"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rope:
    """`theta`, `partial`: what the class takes where config.json is silent."""

    theta: float = 10_000.0
    partial: float = 1.0

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        rope = {**(given.get("rope_scaling") or {}), **(given.get("rope_parameters") or {})}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in _NUMBERS:
            raise CheckpointError(f"rope_parameters.rope_type: {kind!r} is not supported; known: {', '.join(_NUMBERS)}")
        paths = {"attention.rope_theta": rope.get("rope_theta") or given.get("rope_theta") or self.theta}
        size = given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"]
        partial = rope.get("partial_rotary_factor", given.get("partial_rotary_factor", self.partial))
        rotated = given.get("rotary_dim") or int(size * partial)
        if rotated != size:
            paths["attention.rotary_dim"] = rotated
        if kind != "default":
            paths["attention.rope_scaling"] = {"kind": kind, **_scaling(kind, rope, given)}
        return paths

    def write(self, config: ModelConfig) -> dict[str, Any]:
        a = config.attention
        size = heads(config)[2]
        scaling = a.rope_scaling
        kind = "default" if scaling.kind == "none" else scaling.kind
        rope: dict[str, Any] = {"rope_type": kind, "rope_theta": a.rope_theta}
        values = {name: getattr(scaling, name) for name in _NUMBERS[kind]}
        rope |= {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
        if kind == "longrope":
            rope |= {"short_mscale": scaling.attention_factor, "long_mscale": scaling.long_attention_factor}
        # both spellings: readers before transformers 5 only know the second
        written = {"rope_parameters": rope, "rope_theta": a.rope_theta}
        if kind != "default":
            written["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        if (a.rotary_dim or size) != size or self.partial != 1.0:
            rope["partial_rotary_factor"] = written["partial_rotary_factor"] = (a.rotary_dim or size) / size
        return written


def _scaling(kind: str, rope: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Our numbers of one kind, what is not written worked out from what is."""
    original = rope.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    original = original or given.get("max_position_embeddings")
    factor = rope.get("factor") or given["max_position_embeddings"] / original
    numbers = {"factor": float(factor), "original_max_position_embeddings": original}
    numbers |= {name: rope[name] for name in _NUMBERS[kind] if rope.get(name) is not None}
    if kind == "yarn":
        numbers.setdefault("attention_factor", _yarn_factor(factor, rope.get("mscale"), rope.get("mscale_all_dim")))
    if kind == "longrope":
        stretched = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        known = rope.get("attention_factor") or stretched
        numbers["attention_factor"] = rope.get("short_mscale", known)
        numbers["long_attention_factor"] = rope.get("long_mscale", known)
    if kind == "linear":
        numbers.pop("original_max_position_embeddings")
    return numbers


def _yarn_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """The paper's temperature, or the ratio of two of them."""
    of = lambda scale: 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0
    return of(mscale) / of(mscale_all_dim) if mscale and mscale_all_dim else of(1.0)
