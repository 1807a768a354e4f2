"""PHATGOOSE (Muqeeth et al., arXiv 2402.05859): each LoRA learns a gate of its own; the gates become the router.

    stage "gate"    one frozen LoRA, y = y0 + sigmoid(v x) s (x A) B; only v trains, from zero, on the LoRA's own task
    stage "route"   of many: scores = LN(x) LN(v_e) / sqrt(D), LN without affine; softmax over all, the K best,
                    renormalised. Nothing trains

`transform.join_experts` makes the second of several of the first. Standardising both sides matters: by plain products
the experts with a large v would win everywhere.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe_zoo.adapters.routed import Routed, RoutedConfig, gate_stats, top_k_gates
from moe_zoo.core.aux import Aux
from moe_zoo.core.param import Constant, Frozen, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.routing.router import at_least_f32, check_experts_per_tok, linear_logits

_EPS = 1e-5  # theirs: a trained v can be so small that it matters


@dataclasses.dataclass(frozen=True)
class PhatgooseConfig(RoutedConfig):
    """`num_experts_per_tok` K (paper: 2), of stage "route"."""

    num_experts: int = 1
    freeze_experts: bool = True
    stage: Literal["gate", "route"] = "gate"
    num_experts_per_tok: int = 2

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "num_experts_per_tok")
        if self.stage == "route":
            check_experts_per_tok(self.num_experts_per_tok, self.num_experts, path)
        elif self.num_experts != 1:
            raise ConfigError(
                f"{join(path, 'num_experts')}: {self.num_experts}; in stage 'gate' one LoRA learns its gate"
            )


class Phatgoose(Routed):
    """PHATGOOSE: gates that each LoRA has learned alone, standardised, as the router over all of them."""

    Config = PhatgooseConfig

    def add_router(self) -> None:
        E, _, D, _ = self.dims
        kind = nnx.Param if self.config.stage == "gate" else Frozen
        self.router = param((D, E), (self.linear.axes[0], "expert_logits"), Constant(0.0), kind=kind)

    def gate(self, x_TD, hidden_TER, ctx):
        if self.config.stage == "route":
            return super().gate(x_TD, hidden_TER, ctx)
        gates_TE = jax.nn.sigmoid(linear_logits(x_TD, self.router[...]))
        return gates_TE, Aux(stats=gate_stats(gates_TE, None, ctx, self.live().any().astype(jnp.float32)))

    def logits(self, x_TD, hidden_TER):
        v_ED = standardised(at_least_f32(self.router[...]).T)
        return standardised(at_least_f32(x_TD)) @ v_ED.T / math.sqrt(x_TD.shape[-1])

    def chosen(self, probs_TE, ctx):
        return top_k_gates(probs_TE, self.config.num_experts_per_tok, renormalise=True)

    def most_gates(self):
        return self.config.num_experts_per_tok if self.config.stage == "route" else None


def standardised(x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """Mean 0 and variance 1 over the features; zero stays zero."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + _EPS)
