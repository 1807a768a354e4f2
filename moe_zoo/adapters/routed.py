"""Mixtures of LoRA whose gates come from the layer's own input: what they have in common.

    z = x W_g (E logits),  p = softmax(z),  G = chosen(p)

float32; W_g is drawn as PEFT draws a linear layer, U(-1/sqrt(D), 1/sqrt(D)). Where layers differ in their number of
experts (MoLA), or an expert has nothing for a layer, its logit is left out of the softmax.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from moe_zoo.adapters.adapter import Adapter
from moe_zoo.adapters.targets import AdapterConfig, Linear
from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.param import Frozen, Uniform, param
from moe_zoo.core.schema import positive
from moe_zoo.losses.load_balance import load_balance
from moe_zoo.routing.router import linear_logits


@dataclasses.dataclass(frozen=True)
class RoutedConfig(AdapterConfig):
    """`num_experts` E beside each linear layer. `freeze_experts`: only what routes is trained, over experts that were
    trained before.
    """

    num_experts: int = 4
    freeze_experts: bool = False

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "num_experts")

    def experts(self, name: str, num_layers: int) -> int:
        return self.num_experts


class Routed(Adapter):
    """A softmax over experts. A subclass says what is made of it (`chosen`), and what trains it (`losses`)."""

    Config: ClassVar[type] = RoutedConfig

    def __init__(self, config: RoutedConfig, linear: Linear):
        super().__init__(config, linear, kind=Frozen if config.freeze_experts else nnx.Param)
        self.add_router()

    def add_router(self) -> None:
        """Declares what decides."""
        E, _, D, _ = self.dims
        axes = (self.linear.axes[0], "expert_logits")
        self.router = param((D, E), axes, Uniform(1 / math.sqrt(D)))

    def gate(self, x_TD, hidden_TER, ctx: RoutingContext):
        logits_TE = self.among_live(self.informed(self.logits(x_TD, hidden_TER), ctx))
        probs_TE = jax.nn.softmax(logits_TE)
        gates_TE = self.chosen(probs_TE, ctx)
        losses = self.losses(probs_TE, gates_TE, ctx)
        # a layer that is no target computes nothing, is trained by nothing and counts for nothing
        on = self.live().any().astype(jnp.float32)
        losses = {f"adapter_{name}": on * value for name, value in losses.items()}
        return gates_TE, Aux(losses=losses, stats=gate_stats(gates_TE, probs_TE, ctx, on))

    def logits(self, x_TD: Float[Array, "T D"], hidden_TER: Float[Array, "T E R"]) -> Float[Array, "T E"]:
        """z, in float32."""
        return linear_logits(x_TD, self.router[...])

    def informed(self, logits_TE: Float[Array, "T E"], ctx: RoutingContext) -> Float[Array, "T E"]:
        """z with what is known from elsewhere than the layer's input."""
        return logits_TE

    def chosen(self, probs_TE: Float[Array, "T E"], ctx: RoutingContext) -> Float[Array, "T E"]:
        """The gates: p itself, unless a subclass thins it out."""
        return probs_TE

    def losses(
        self, probs_TE: Float[Array, "T E"], gates_TE: Float[Array, "T E"], ctx: RoutingContext
    ) -> dict[str, Float[Array, ""]]:
        """What is added to the loss for each linear layer, coefficients applied."""
        return {}

    def live(self) -> Bool[Array, "E"]:
        """The experts that this layer has."""
        return (self.scale[...] != 0).any(-1)

    def among_live(self, logits_TE: Float[Array, "T E"]) -> Float[Array, "T E"]:
        """Logits whose softmax gives nothing to experts that the layer does not have."""
        live_E = self.live()
        return jnp.where(live_E | ~live_E.any(), logits_TE, -jnp.inf)

    def idle_parameters(self) -> int:
        scales = self.config.scales(self.linear)
        idle_LE = (scales == 0).all(-1)
        return super().idle_parameters() + int(idle_LE.sum()) * self.linear.in_features

    def flops_per_token(self) -> int:
        return super().flops_per_token() + 2 * self.linear.in_features * self.num_experts


def top_k_gates(probs_TE: Float[Array, "T E"], K: int, *, renormalise: bool) -> Float[Array, "T E"]:
    """The K largest probabilities, the others zero; `renormalise`: made to sum to 1."""
    kept_TE = largest(probs_TE, K)
    gates_TE = jnp.where(kept_TE, probs_TE, 0)
    return gates_TE / (gates_TE.sum(-1, keepdims=True) + 1e-20) if renormalise else gates_TE


def largest(values_TE: Float[Array, "T E"], K: int) -> Bool[Array, "T E"]:
    """Which K of each row are the largest, ties to the lower id. No gradient."""
    E = values_TE.shape[-1]
    if K >= E:
        return jnp.ones(values_TE.shape, bool)
    ids_TK = jax.lax.top_k(jax.lax.stop_gradient(values_TE), K)[1]
    return (ids_TK[..., None] == jnp.arange(E)).any(1)


def balance(probs_TE, gates_TE, live_E, ctx: RoutingContext) -> Float[Array, ""]:
    """E sum_e f_e P_e of the Switch Transformer, f being shares of the K T choices and E the experts that are live: 1
    at uniform.
    """
    chosen_TE = gates_TE != 0
    if ctx.valid is not None:
        chosen_TE &= ctx.valid[:, None]
    raw = load_balance(probs_TE, chosen_TE.sum(0), ctx.valid)
    return raw * live_E.sum() / live_E.shape[0]


def valid_weights(T: int, ctx: RoutingContext) -> Float[Array, "T"]:
    """1 for tokens, 0 for padding."""
    return jnp.ones(T, jnp.float32) if ctx.valid is None else ctx.valid.astype(jnp.float32)


def mean_over_valid(values_T: Float[Array, "T"], ctx: RoutingContext) -> Float[Array, ""]:
    """The mean over tokens, padding left out; 0 if there is none."""
    weight_T = valid_weights(values_T.shape[0], ctx)
    return jnp.where(weight_T > 0, values_T, 0).sum() / jnp.maximum(weight_T.sum(), 1)


def gate_stats(gates_TE, probs_TE, ctx: RoutingContext, on: Float[Array, ""]) -> dict[str, Stat]:
    """What every mixture reports: the gate mass of each expert, in all and outside training by domain; experts with a
    gate per token; the entropy of the probabilities. `on`: 1, or 0 for a layer that has no experts.
    """
    gates_TE = jax.lax.stop_gradient(gates_TE)
    weight_T = on * valid_weights(gates_TE.shape[0], ctx)
    mass_TE = gates_TE * weight_T[:, None]
    stats = {
        "load": Stat.sum(mass_TE.sum(0)),
        "experts_per_token": Stat.mean(((gates_TE != 0) * weight_T[:, None]).sum(), weight_T.sum()),
    }
    if ctx.num_domains and ctx.domain is not None:
        domain_XT = (ctx.domain == jnp.arange(ctx.num_domains)[:, None]).astype(jnp.float32)
        stats["load_by_domain"] = Stat.sum(domain_XT @ mass_TE)
    if probs_TE is not None:
        probs_TE = jax.lax.stop_gradient(probs_TE)
        entropy_T = -jnp.sum(probs_TE * jnp.log(jnp.maximum(probs_TE, 1e-30)), -1)
        stats["entropy"] = Stat.mean((entropy_T * weight_T).sum(), weight_T.sum())
    return stats
