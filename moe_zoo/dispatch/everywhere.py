"""Every expert on every token, weighted: exact for any gates, at E times the work of one expert.

The oracle that other dispatchers are tested against, and the honest choice where most experts are active anyway.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.core.aux import Stat
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.decision import Dense, TokenChoice


@dataclasses.dataclass(frozen=True)
class EverywhereConfig:
    """No settings."""


@dataclasses.dataclass(frozen=True)
class Everywhere:
    """All experts compute all tokens; gates weigh them. Nothing is dropped."""

    Config: ClassVar = EverywhereConfig
    decisions: ClassVar = (Dense, TokenChoice)

    config: EverywhereConfig = EverywhereConfig()

    def __call__(
        self, x_TD: Float[Array, "T D"], decision: Dense | TokenChoice, bank, ctx: RoutingContext
    ) -> tuple[Float[Array, "T D"], dict[str, Stat]]:
        dense = decision if isinstance(decision, Dense) else decision.dense()
        E = dense.gates.shape[-1]
        with jax.named_scope("experts"):
            y_ETD = bank.batched(jnp.broadcast_to(x_TD, (E, *x_TD.shape)))
        with jax.named_scope("combine"):
            return jnp.einsum("te,etd->td", dense.gates.astype(y_ETD.dtype), y_ETD), {}
