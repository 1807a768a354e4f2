"""Soft MoE (Puigcerver et al., arXiv 2308.00951): slots are mixtures of tokens, tokens are mixtures of slots.

    logits = scale * (x / |x|) (Phi / |Phi|)     [m tokens, E, s slots]
    dispatch = softmax over tokens, combine = softmax over all E * s slots
    slot = sum_t dispatch x_t,   y_t = sum_slots combine E_e(slot)

Per sequence. Nothing is dropped and there is no loss. NOT causal: slots mix all tokens of the sequence. Padding enters
no slot.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import Soft as SoftDecision
from moe_zoo.core.param import Constant, fan_in, param
from moe_zoo.core.schema import positive
from moe_zoo.routing.router import CostBound, Dims, Router, at_least_f32


@dataclasses.dataclass(frozen=True)
class SoftConfig:
    """`slots_per_expert` s is part of the shape of Phi; s = seq_len / num_experts gives as many slots as tokens."""

    slots_per_expert: int = 16
    eps: float = 1e-6

    def validate(self, path: str) -> None:
        positive(self, path, "slots_per_expert", "eps")


class Soft(Router):
    """Soft MoE per sequence: fully differentiable mixing into and out of slots, not causal."""

    Config = SoftConfig
    decision = SoftDecision
    provides = ("probs",)
    causal = False
    cost = CostBound(24, 14, "every token weighs on all slots of every expert, 16 E of them")

    def __init__(self, config: SoftConfig, dims: Dims):
        self.config, self.num_experts = config, dims.num_experts
        shape = (dims.hidden_size, dims.num_experts, config.slots_per_expert)
        self.phi = param(shape, ("embed", "expert_logits", None), fan_in(dims.hidden_size))
        self.scale = param((), (), Constant(1.0))

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        eps, B, S = self.config.eps, ctx.batch, ctx.seq
        x_BSD = unit(at_least_f32(x_TD), -1, eps).reshape(B, S, -1)
        phi = unit(at_least_f32(self.phi[...]), 0, eps) * self.scale[...]
        logits_BSEC = jnp.einsum("bsd,dec->bsec", x_BSD, phi)
        in_slots = logits_BSEC
        if ctx.valid is not None:
            lowest = jnp.finfo(logits_BSEC.dtype).min
            in_slots = jnp.where(ctx.valid.reshape(B, S, 1, 1), logits_BSEC, lowest)
        dispatch = jax.nn.softmax(in_slots, axis=1)
        combine = jax.nn.softmax(logits_BSEC.reshape(B, S, -1), axis=-1).reshape(logits_BSEC.shape)
        if ctx.valid is not None:
            dispatch = jnp.where(ctx.valid.reshape(B, S, 1, 1), dispatch, 0)
            combine = jnp.where(ctx.valid.reshape(B, S, 1, 1), combine, 0)
        return Routing(SoftDecision(dispatch, combine), None, combine.sum(-1).reshape(B * S, -1))

    def rows_per_token(self, seq_len: int) -> float:
        """Every sequence fills all slots, however long it is."""
        return self.num_experts * self.config.slots_per_expert / seq_len

    def flops_per_token(self, hidden_size: int) -> float:
        """Logits of all slots, mixing into them and out of them."""
        return 6 * hidden_size * self.num_experts * self.config.slots_per_expert


def unit(x: Array, axis: int, eps: float) -> Array:
    """x / (|x| + eps) along an axis: the paper's Algorithm 2. The authors' code has sqrt(|x|^2 + eps) below."""
    return x / (jnp.sqrt(jnp.sum(x * x, axis, keepdims=True) + 1e-30) + eps)
