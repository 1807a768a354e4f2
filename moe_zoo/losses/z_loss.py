"""Router z-loss (ST-MoE, arXiv 2202.08906, eq. 5): L = mean over tokens of logsumexp(z_t)^2.

Softmax is blind to a constant added to all logits, so nothing else keeps them from drifting until float32 rounds badly.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import Dense, TokenChoice
from moe_zoo.core.schema import positive


@dataclasses.dataclass(frozen=True)
class ZLossConfig:
    """`coef` multiplies the loss of each layer (ST-MoE: 0.001)."""

    coef: float = 0.001

    def validate(self, path: str) -> None:
        positive(self, path, "coef", zero=True)


@dataclasses.dataclass(frozen=True)
class ZLoss:
    """Keeps the router's logits from drifting: squared log-partition, averaged over tokens."""

    Config: ClassVar = ZLossConfig
    decisions: ClassVar = (TokenChoice, Dense)
    uses: ClassVar = "logits"

    config: ZLossConfig

    def __call__(self, routing: Routing, ctx: RoutingContext) -> Float[Array, ""]:
        """The raw loss, without the coefficient."""
        return z_loss(routing.logits, ctx.valid)


def z_loss(logits_TE: Float[Array, "T E"], valid_T: Bool[Array, "T"] | None = None) -> Float[Array, ""]:
    """Mean squared logsumexp over the valid tokens; 0 if there is none."""
    square_T = jax.nn.logsumexp(logits_TE, axis=-1) ** 2
    if valid_T is None:
        return square_T.mean()
    return jnp.where(valid_T, square_T, 0).sum() / jnp.maximum(valid_T.sum(), 1)
