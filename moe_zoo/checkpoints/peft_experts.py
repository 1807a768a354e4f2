"""LoRA beside routed experts: PEFT's, on the stacked weights of transformers' classes, and ours, on each linear layer.

    theirs  A [E r, in], expert by expert; B [out, r E], rank by rank all experts: of gate_up_proj, down_proj
    ours    a [E, r, D]; b [E, r, N]: of w_gate, w_up, w_down

A class that keeps gate and up in one weight has one A for both: ours get it twice, and half of B each. Back, equal A
are one again; others stand below each other, with zeros in B where a half does not look: twice the rank, the same
update, and what PEFT itself makes of LoRAs on weights apart. Read, such halves are two of the old rank again.

Files from when each expert was a module of its own have a LoRA for each, `experts.3.gate_proj`; they are read.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from moe_zoo.checkpoints import peft
from moe_zoo.checkpoints.hf.family import Family
from moe_zoo.checkpoints.native import CheckpointError
from moe_zoo.core.registry import ConfigError

#: where the classes of transformers have experts, below the layer: module -> model types
_MODULES = {
    "mlp.experts": (
        "afmoe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe",
        "gpt_oss", "hunyuan_v1_moe", "kimi_linear", "minimax", "minimax_m2", "mixtral", "olmoe", "phimoe",
        "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next",
    ),
    "block_sparse_moe.experts": ("granitemoe", "granitemoehybrid", "granitemoeshared"),
    "feed_forward.experts": ("jamba", "lfm2_moe", "llama4_text"),
}  # fmt: skip
#: [E, in, out], and no word of it to PEFT, which takes outputs for inputs
_TURNED = ("llama4_text",)


@dataclasses.dataclass(frozen=True)
class ExpertModule:
    """One linear layer of every expert: y_e += scale (x a_e^T) b_e."""

    a: Float[np.ndarray, "E r D"]
    b: Float[np.ndarray, "E r N"]
    alpha: float
    scale: float
    magnitude: None = None

    @property
    def rank(self) -> int:
        return self.a.shape[1]


@dataclasses.dataclass(frozen=True)
class Stacked:
    """How a family's class keeps its experts: the module below the layer; `turned`: A is on outputs; `interleaved`:
    gate and up take turns.
    """

    module: str
    turned: bool
    interleaved: bool


def stacked(family: Family) -> Stacked | None:
    """None for a family whose experts PEFT cannot have."""
    module = next((module for module, types in _MODULES.items() if family.model_type in types), None)
    if module is None:
        return None
    gate = family.layer.get("ffn.experts.w_gate")
    return Stacked(module, family.model_type in _TURNED, gate is not None and gate.interleaved)


def parameter_of(linear: str, gated: bool) -> str:
    """The parameter that has the weights of our linear layer of a bank."""
    return "down_proj" if linear == "w_down" else "gate_up_proj" if gated else "up_proj"


def split(parameter: str, m: peft.LoraModule, how: Stacked, use_rslora: bool) -> dict[str, ExpertModule]:
    """A parameter's update as those of our linear layers, by name."""
    a_ERX = m.a.reshape(m.experts, m.rank, -1)
    b_ERX = m.b.reshape(-1, m.rank, m.experts).transpose(2, 1, 0)
    if how.turned:
        a_ERX, b_ERX = b_ERX, a_ERX
    if parameter != "gate_up_proj":
        return {f"w_{parameter.removesuffix('_proj')}": ExpertModule(a_ERX, b_ERX, m.alpha, m.scale)}
    N, R = b_ERX.shape[-1], m.rank
    if N % 2:
        raise CheckpointError(f"gate_up_proj: its LoRA has {N} outputs, which are no two halves")
    gate, up = (b_ERX[..., 0::2], b_ERX[..., 1::2]) if how.interleaved else np.split(b_ERX, 2, axis=-1)
    first, last = slice(0, R // 2), slice(R // 2, R)
    apart = R % 2 == 0 and not up[:, first].any() and not gate[:, last].any()
    if not apart or not (gate.any() and up.any()):
        return {f"w_{name}": ExpertModule(a_ERX, b, m.alpha, m.scale) for name, b in (("gate", gate), ("up", up))}
    alpha = peft.alpha_of(m.scale, R // 2, use_rslora)
    return {
        "w_gate": ExpertModule(a_ERX[:, first], gate[:, first], alpha, m.scale),
        "w_up": ExpertModule(a_ERX[:, last], up[:, last], alpha, m.scale),
    }


def join(parts: Mapping[str, ExpertModule], how: Stacked, gated: bool, use_rslora: bool) -> dict[str, peft.LoraModule]:
    """One layer's updates, by our linear layer's name, as those of PEFT's parameters. Raises ConfigError for gate and
    up of different scale.
    """
    found = {parameter_of(name, gated): part for name, part in parts.items()}
    if "gate_up_proj" in found:
        found["gate_up_proj"] = _joined(parts.get("w_gate"), parts.get("w_up"), how, use_rslora)
    return {name: _flat(part, how) for name, part in found.items()}


def _joined(gate: ExpertModule | None, up: ExpertModule | None, how: Stacked, use_rslora: bool) -> ExpertModule:
    gate, up = gate or _none_like(up), up or _none_like(gate)
    if gate.scale != up.scale:
        raise ConfigError(
            f"ffn.experts: w_gate is scaled by {gate.scale:g} and w_up by {up.scale:g}; PEFT has one scale for both"
        )
    if np.array_equal(gate.a, up.a):
        a, b_gate, b_up = gate.a, gate.b, up.b
    else:
        a = np.concatenate([gate.a, up.a], axis=1)
        b_gate = np.concatenate([gate.b, np.zeros((*up.a.shape[:2], gate.b.shape[-1]), gate.b.dtype)], axis=1)
        b_up = np.concatenate([np.zeros((*gate.a.shape[:2], up.b.shape[-1]), up.b.dtype), up.b], axis=1)
    if how.interleaved:
        b = np.stack([b_gate, b_up], axis=-1).reshape(*b_gate.shape[:2], -1)
    else:
        b = np.concatenate([b_gate, b_up], axis=-1)
    return ExpertModule(a, b, peft.alpha_of(gate.scale, a.shape[1], use_rslora), gate.scale)


def _none_like(part: ExpertModule) -> ExpertModule:
    """The other half of what has one: the same A, and nothing made of it."""
    return dataclasses.replace(part, b=np.zeros_like(part.b))


def _flat(part: ExpertModule, how: Stacked) -> peft.LoraModule:
    a_ERX, b_ERX = (part.b, part.a) if how.turned else (part.a, part.b)
    E, R, _ = a_ERX.shape
    b = np.ascontiguousarray(b_ERX.transpose(2, 1, 0)).reshape(-1, R * E)
    return peft.LoraModule(a_ERX.reshape(E * R, -1), b, part.alpha, part.scale, experts=E)


def gathered(of: Mapping[int, peft.LoraModule], E: int, use_rslora: bool, where: str) -> ExpertModule:
    """The LoRAs of single experts as one; smaller ranks are filled up with zeros, and so are experts without one."""
    first = next(iter(of.values()))
    R = max(m.rank for m in of.values())
    a = np.zeros((E, R, first.a.shape[1]), first.a.dtype)
    b = np.zeros((E, R, first.b.shape[0]), first.b.dtype)
    for e, m in of.items():
        alike = (m.a.shape[1], m.b.shape[0], m.scale) == (a.shape[2], b.shape[2], first.scale)
        if not alike or m.magnitude is not None:
            raise CheckpointError(f"{where}: the LoRAs of its experts differ in size or scale, or are DoRA")
        a[e, : m.rank], b[e, : m.rank] = m.a, m.b.T
    return ExpertModule(a, b, peft.alpha_of(first.scale, R, use_rslora), first.scale)
