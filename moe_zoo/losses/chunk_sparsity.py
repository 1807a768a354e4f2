"""BlockFFN's chunk sparsification loss (arXiv 2507.08771, equation 6): few experts per chunk of tokens.

    P_e = 1 - exp( sum over tokens k of the chunk of log(1 - p_ke + 1e-5) );  mean over chunks and experts

p is the router's share of each expert. Chunks of `length` tokens do not overlap and ignore document boundaries; the
last one may be shorter; padding counts as nothing. Bounds: one expert for all gives 1/E, uniform shares 1 - (1 -
1/E)^length.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import Dense, TokenChoice
from moe_zoo.core.schema import positive


@dataclasses.dataclass(frozen=True)
class ChunkSparsityConfig:
    """`coef` (paper: begins at 5e-2 on the mean over layers; the objective `scheduled_loss` moves it) and the chunk
    `length` (64).
    """

    coef: float = 5e-2
    length: int = 64

    def validate(self, path: str) -> None:
        positive(self, path, "length")
        positive(self, path, "coef", zero=True)


@dataclasses.dataclass(frozen=True)
class ChunkSparsity:
    """The expected share of experts that a chunk of neighbouring tokens needs."""

    Config: ClassVar = ChunkSparsityConfig
    decisions: ClassVar = (Dense, TokenChoice)
    uses: ClassVar = "probs"

    config: ChunkSparsityConfig

    def __call__(self, routing: Routing, ctx: RoutingContext) -> Float[Array, ""]:
        """The raw loss, without the coefficient."""
        B, S, L = ctx.batch, ctx.seq, min(self.config.length, ctx.seq)
        p_BSE = routing.probs.reshape(B, S, -1)
        counted = jnp.ones((B, S), bool) if ctx.valid is None else ctx.valid.reshape(B, S)
        log_off = jnp.where(counted[..., None], jnp.log(1 - p_BSE + 1e-5), 0)
        fill = -S % L
        log_off = jnp.pad(log_off, ((0, 0), (0, fill), (0, 0))).reshape(B, -1, L, log_off.shape[-1])
        there = jnp.pad(counted, ((0, 0), (0, fill))).reshape(B, -1, L).any(-1)
        needed = 1 - jnp.exp(log_off.sum(2))
        return jnp.where(there[..., None], needed, 0).sum() / (jnp.maximum(there.sum(), 1) * needed.shape[-1])
