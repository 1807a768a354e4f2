"""The Switch / GShard load-balance loss (arXiv 2101.03961 eq. 4-6; arXiv 2006.16668 up to a constant).

    L = E * sum_e f_e * P_e,   f_e = share of (token, slot) pairs sent to e,   P_e = mean over tokens of p_te

f is counted before any drop and carries no gradient. L is 1 at perfect balance. Per layer; layers add up.
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
class LoadBalanceConfig:
    """`coef` multiplies the loss of each layer (Switch, OLMoE: 0.01)."""

    coef: float = 0.01

    def validate(self, path: str) -> None:
        positive(self, path, "coef", zero=True)


@dataclasses.dataclass(frozen=True)
class LoadBalance:
    """Pulls the share of tokens per expert and the mean router probability together towards uniform."""

    Config: ClassVar = LoadBalanceConfig
    #: Decision types it can be applied to
    decisions: ClassVar = (TokenChoice,)
    #: the field of Routing that it is computed from
    uses: ClassVar = "probs"

    config: LoadBalanceConfig

    def __call__(self, routing: Routing, ctx: RoutingContext) -> Float[Array, ""]:
        """The raw loss, without the coefficient."""
        return load_balance(routing.probs, routing.decision.counts(), ctx.valid)


def load_balance(
    probs_TE: Float[Array, "T E"], counts_E: Float[Array, "E"], valid_T: Bool[Array, "T"] | None = None
) -> Float[Array, ""]:
    """E * sum_e f_e P_e over the valid tokens; 0 if there is none."""
    E = probs_TE.shape[-1]
    counts_E = jax.lax.stop_gradient(counts_E).astype(probs_TE.dtype)
    f_E = counts_E / jnp.maximum(counts_E.sum(), 1)
    if valid_T is None:
        return E * jnp.sum(f_E * probs_TE.mean(0))
    P_E = jnp.where(valid_T[:, None], probs_TE, 0).sum(0) / jnp.maximum(valid_T.sum(), 1)
    return E * jnp.sum(f_E * P_E)
