"""The dynamic loss of Top-P routing (arXiv 2403.07652): L = mean over tokens of -sum_e p_te log p_te, minimised.

A router that pays for probability mass by the expert (Top-P) can always buy more experts by flattening its
distribution. This makes a flat one cost something.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import Dense, TokenChoice
from moe_zoo.core.schema import positive


@dataclasses.dataclass(frozen=True)
class EntropyLossConfig:
    """`coef` multiplies the loss of each layer (paper: 1e-4)."""

    coef: float = 1e-4

    def validate(self, path: str) -> None:
        positive(self, path, "coef", zero=True)


@dataclasses.dataclass(frozen=True)
class EntropyLoss:
    """Keeps the router's distribution sharp: its entropy in nats, averaged over tokens."""

    Config: ClassVar = EntropyLossConfig
    decisions: ClassVar = (TokenChoice, Dense)
    uses: ClassVar = "probs"

    config: EntropyLossConfig

    def __call__(self, routing: Routing, ctx: RoutingContext) -> Float[Array, ""]:
        """The raw loss, without the coefficient."""
        return entropy(routing.probs, ctx.valid)


def entropy(probs_TE: Float[Array, "T E"], valid_T: Bool[Array, "T"] | None = None) -> Float[Array, ""]:
    """Mean entropy over the valid tokens, in [0, log E]; 0 if there is none."""
    # p log p has slope -inf at 0: what underflowed has a finite one
    entropy_T = -(probs_TE * jnp.log(jnp.maximum(probs_TE, 1e-30))).sum(-1)
    if valid_T is None:
        return entropy_T.mean()
    return jnp.where(valid_T, entropy_T, 0).sum() / jnp.maximum(valid_T.sum(), 1)
