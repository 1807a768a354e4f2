"""AdaMoE's load balance over true and null experts (arXiv 2406.13233, equation 6, up to a constant).

    L = (E + M) * sum over all E + M of f~_i P_i,   f_i = share of all picks,   P_i = mean over tokens of p_ti
    f~_i = f_i for the E true experts, and the mean of f over the M nulls for each of these

Nulls do nothing, so which of them is picked does not matter: they share one load, and only true against null is
balanced, which settles the mean number of true experts at k E / (E + M). L is 1 at balance; without nulls it is
`load_balance`. In the paper f sums to k, so that its alpha is `coef` / k.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.schema import positive


@dataclasses.dataclass(frozen=True)
class NullLoadBalanceConfig:
    """`coef` multiplies the loss of each layer. Paper: k * 0.02, and k * 1e-4 in the second of two epochs."""

    coef: float = 0.01

    def validate(self, path: str) -> None:
        positive(self, path, "coef", zero=True)


@dataclasses.dataclass(frozen=True)
class NullLoadBalance:
    """Balances true experts among each other and against the null experts, but not nulls among each other."""

    Config: ClassVar = NullLoadBalanceConfig
    decisions: ClassVar = (TokenChoice,)
    uses: ClassVar = "null_probs"

    config: NullLoadBalanceConfig

    def __call__(self, routing: Routing, ctx: RoutingContext) -> Float[Array, ""]:
        """The raw loss, without the coefficient."""
        choice = routing.decision
        tokens = ctx.batch * ctx.seq if ctx.valid is None else ctx.valid.sum()
        return null_load_balance(routing.probs, choice.counts(), tokens * choice.experts.shape[1], ctx.valid)


def null_load_balance(
    probs_TN: Float[Array, "T N"],
    counts_E: Float[Array, "E"],
    picks: Float[Array, ""] | int,
    valid_T: Bool[Array, "T"] | None = None,
) -> Float[Array, ""]:
    """N * sum_i f~_i P_i over the valid tokens, of N = E + M columns the nulls last; 0 if there is none.

    `counts_E`: picks of each true expert. `picks`: of all tokens, nulls included.
    """
    E, N = counts_E.shape[-1], probs_TN.shape[-1]
    counts_E = jax.lax.stop_gradient(counts_E).astype(probs_TN.dtype)
    each_null = (picks - counts_E.sum()) / max(N - E, 1)
    f_N = jnp.concatenate([counts_E, jnp.full(N - E, each_null, counts_E.dtype)]) / jnp.maximum(picks, 1)
    if valid_T is None:
        return N * jnp.sum(f_N * probs_TN.mean(0))
    P_N = jnp.where(valid_T[:, None], probs_TN, 0).sum(0) / jnp.maximum(valid_T.sum(), 1)
    return N * jnp.sum(f_N * P_N)
