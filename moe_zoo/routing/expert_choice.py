"""Expert choice (Zhou et al., arXiv 2202.09368): experts pick tokens, so load is even by construction.

    P = softmax over experts of x W;  expert e takes the C = ceil(cf * T / E) tokens of each group with the largest P_te
    y_t = sum over the experts that chose t of P_te E_e(x_t)        (nobody: zero)

Groups are sequences or the whole batch. NOT causal: whether a token is taken depends on later tokens, so a decoder
trained with it can see the future; the model says so and refuses to generate.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import ExpertChoice as ExpertChoiceDecision
from moe_zoo.core.param import Normal, param
from moe_zoo.core.schema import positive
from moe_zoo.routing.router import CostBound, Dims, Router, linear_logits


@dataclasses.dataclass(frozen=True)
class ExpertChoiceConfig:
    """`capacity_factor` cf: experts per token on average (2 in the paper). `group`: what an expert picks from."""

    capacity_factor: float = 2.0
    group: Literal["batch", "sequence"] = "sequence"
    init_std: float = 0.02

    def validate(self, path: str) -> None:
        positive(self, path, "capacity_factor", "init_std")


class ExpertChoice(Router):
    """Every expert takes its best tokens of the group: perfectly even load, a varying number of experts, not causal."""

    Config = ExpertChoiceConfig
    decision = ExpertChoiceDecision
    causal = False
    cost = CostBound(2.5, 2.5, "an expert's C best of a sequence are sorted, not a token's two")

    def __init__(self, config: ExpertChoiceConfig, dims: Dims):
        self.config, self.num_experts = config, dims.num_experts
        self.kernel = param((dims.hidden_size, dims.num_experts), ("embed", "expert_logits"), Normal(config.init_std))

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        logits_TE = linear_logits(x_TD, self.kernel[...])
        probs_TE = jax.nn.softmax(logits_TE)
        G = ctx.batch if self.config.group == "sequence" else 1
        S = x_TD.shape[0] // G
        C = min(S, math.ceil(round(self.config.capacity_factor * S / self.num_experts, 6)))
        # padding is never worth choosing, and what had to be taken to fill C places is marked as no token
        choice_TE = probs_TE if ctx.valid is None else jnp.where(ctx.valid[:, None], probs_TE, -1.0)
        choice_GES = jax.lax.stop_gradient(choice_TE).reshape(G, S, -1).swapaxes(1, 2)
        if "router_bias" in ctx.inputs:
            choice_GES = choice_GES + ctx.inputs["router_bias"][:, None]
        _, tokens_GEC = jax.lax.top_k(choice_GES, C)
        gates_GEC = jnp.take_along_axis(probs_TE.reshape(G, S, -1).swapaxes(1, 2), tokens_GEC, axis=-1)
        if ctx.valid is not None:
            real_GEC = jnp.take_along_axis(ctx.valid.reshape(G, 1, S), tokens_GEC, axis=-1)
            tokens_GEC, gates_GEC = jnp.where(real_GEC, tokens_GEC, S), jnp.where(real_GEC, gates_GEC, 0)
        decision = ExpertChoiceDecision(tokens_GEC.astype(jnp.int32), gates_GEC)
        return Routing(decision, logits_TE, probs_TE, aux=Aux(stats=coverage(decision, S, ctx)))

    def active(self) -> float:
        return min(self.config.capacity_factor, self.num_experts)


def coverage(decision: ExpertChoiceDecision, S: int, ctx: RoutingContext) -> dict[str, Stat]:
    """Share of valid tokens with at least one expert."""
    G = decision.tokens.shape[0]
    hit_GS = jnp.zeros((G, S + 1), bool).at[jnp.arange(G)[:, None], decision.tokens.reshape(G, -1)].set(True)[:, :S]
    total = jnp.float32(G * S) if ctx.valid is None else ctx.valid.sum().astype(jnp.float32)
    return {"coverage": Stat.mean(hit_GS.sum().astype(jnp.float32), total)}
