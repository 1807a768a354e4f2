"""BlockFFN's activation locality loss (arXiv 2507.08771, equation 5): neighbours should use the same experts.

    mean over (token k, expert e) of BCE(prediction = sigmoid(alpha A0_ke), target = sigmoid(alpha A0_{k+1,e}))

on the router's raw scores A0. Pairs whose right token begins another document, or is padding, are left out. The target
is not detached: both tokens move.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import Dense, TokenChoice
from moe_zoo.core.schema import positive


@dataclasses.dataclass(frozen=True)
class LocalityConfig:
    """`coef` per layer and the sharpness `alpha` (100). Layers add up here; the paper averages them, with 1e-3 to 2e-3
    on the mean: its coefficient is `coef` times the number of layers.
    """

    coef: float = 2e-3
    alpha: float = 100.0

    def validate(self, path: str) -> None:
        positive(self, path, "alpha")
        positive(self, path, "coef", zero=True)


@dataclasses.dataclass(frozen=True)
class Locality:
    """Neighbouring tokens of a document should switch the same experts on."""

    Config: ClassVar = LocalityConfig
    decisions: ClassVar = (Dense, TokenChoice)
    uses: ClassVar = "logits"

    config: LocalityConfig

    def __call__(self, routing: Routing, ctx: RoutingContext) -> Float[Array, ""]:
        """The raw loss, without the coefficient."""
        z_BSE = self.config.alpha * routing.logits.reshape(ctx.batch, ctx.seq, -1)
        left, right = z_BSE[:, :-1], z_BSE[:, 1:]
        bce = jax.nn.softplus(left) - jax.nn.sigmoid(right) * left
        pair = jnp.ones((ctx.batch, ctx.seq - 1), bool)
        for of_token in (ctx.segment_ids, ctx.valid):
            if of_token is not None:
                per_row = of_token.reshape(ctx.batch, ctx.seq)
                pair &= per_row[:, :-1] == per_row[:, 1:]
        if ctx.valid is not None:
            pair &= ctx.valid.reshape(ctx.batch, ctx.seq)[:, 1:]
        return jnp.where(pair[..., None], bce, 0).sum() / (jnp.maximum(pair.sum(), 1) * bce.shape[-1])
