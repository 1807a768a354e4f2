"""AdaMoE (Zeng et al., arXiv 2406.13233): top-k over the experts and some null experts, which cost nothing.

    P = softmax(x [W, N]) over all E + M;  picks = TopK(P, k), k larger than usual
    gates = P over their sum, on the picked true experts only;  y = sum over the picked true experts

So a token has k experts minus the nulls that it picked; with none left it skips the layer. The loss
`null_load_balance` decides how many that are on average: at balance k E / (E + M). Without nulls this is top-k with
renormalised gates.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.param import Normal, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.routing.router import CostBound, Dims, Router, gather_gates, linear_logits
from moe_zoo.routing.top_k import select


@dataclasses.dataclass(frozen=True)
class NullExpertsConfig:
    """`num_null_experts` M and the number of picks k, nulls included (paper: M = 8 and k = 3 beside E = 8)."""

    num_null_experts: int = 8
    picks_per_token: int = 3
    init_std: float = 0.02

    def validate(self, path: str) -> None:
        positive(self, path, "picks_per_token", "init_std")
        positive(self, path, "num_null_experts", zero=True)

    def validate_for(self, num_experts: int, path: str) -> None:
        """What can only be checked once the bank's size is known."""
        there = num_experts + self.num_null_experts
        if self.picks_per_token > there:
            raise ConfigError(
                f"{join(path, 'picks_per_token')}: {self.picks_per_token} picks of num_experts={num_experts} and "
                f"num_null_experts={self.num_null_experts}; at most {there}"
            )


class NullExperts(Router):
    """AdaMoE: top-k over true and null experts, so that a token's number of true experts varies.

    `logits` and `probs` of its Routing have M columns more than there are experts: the nulls come last.
    """

    Config = NullExpertsConfig
    provides = ("logits", "null_probs")
    cost = CostBound(2.5, 2.5, "E + M logits and three picks by default, where top-k has E and two")

    def __init__(self, config: NullExpertsConfig, dims: Dims):
        self.config, self.num_experts = config, dims.num_experts
        D, init = dims.hidden_size, Normal(config.init_std)
        self.kernel = param((D, dims.num_experts), ("embed", "expert_logits"), init)
        if config.num_null_experts:
            self.null_kernel = param((D, config.num_null_experts), ("embed", None), init)

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        E, M = self.num_experts, self.config.num_null_experts
        # N = E + M columns: the true experts first, so that they win where a null is a copy
        logits_TN = linear_logits(x_TD, self.kernel[...])
        if M:
            logits_TN = jnp.concatenate([logits_TN, linear_logits(x_TD, self.null_kernel[...])], -1)
        probs_TN = jax.nn.softmax(logits_TN)
        bias_N = jnp.pad(ctx.inputs["router_bias"], (0, M)) if "router_bias" in ctx.inputs else None
        # by logits: a softmax may tell equal logits apart, or make unequal ones equal
        picks_TK = select(logits_TN, self.config.picks_per_token, bias_N)
        true_TK = picks_TK < E
        gates_TK = true_softmax(gather_gates(logits_TN, picks_TK), true_TK)
        choice = TokenChoice(jnp.where(true_TK, picks_TK, E), gates_TK, E)
        return Routing(choice, logits_TN, probs_TN, aux=Aux(stats={"skipped_fraction": skipped(choice, ctx)}))

    def max_active(self) -> int:
        return min(self.config.picks_per_token, self.num_experts)

    def active(self) -> float:
        """At balance."""
        E, M = self.num_experts, self.config.num_null_experts
        return self.config.picks_per_token * E / (E + M)

    def flops_per_token(self, hidden_size: int) -> float:
        return 2 * hidden_size * (self.num_experts + self.config.num_null_experts)


def true_softmax(logits_TK: Float[Array, "T K"], true_TK) -> Float[Array, "T K"]:
    """Softmax over the true picks: P over their sum, safe where all of it underflows; zeros where none is true."""
    none_T1 = ~true_TK.any(-1, keepdims=True)
    gates_TK = jax.nn.softmax(jnp.where(true_TK | none_T1, logits_TK, -jnp.inf))
    return jnp.where(true_TK, gates_TK, 0)


def skipped(choice: TokenChoice, ctx: RoutingContext) -> Stat:
    """The share of valid tokens whose picks are all null."""
    none_T = ~choice.live().any(-1)
    valid_T = jnp.ones(none_T.shape, bool) if ctx.valid is None else ctx.valid
    return Stat.mean((none_T & valid_T).sum().astype(jnp.float32), valid_T.sum().astype(jnp.float32))
