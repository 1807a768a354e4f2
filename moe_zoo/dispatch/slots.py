"""Dispatch for routers that fill slots: expert choice picks a token per slot, Soft MoE mixes all tokens into each.

Every expert has the same number of slots, so the bank's batched door serves both.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.core.aux import Stat
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.decision import ExpertChoice, Soft


@dataclasses.dataclass(frozen=True)
class SlotsConfig:
    """No settings: the decision says how many slots there are."""


@dataclasses.dataclass(frozen=True)
class Slots:
    """Slots filled by the router: one token each (expert choice) or a mixture (Soft MoE). Nothing is dropped."""

    Config: ClassVar = SlotsConfig
    decisions: ClassVar = (ExpertChoice, Soft)

    config: SlotsConfig = SlotsConfig()

    def __call__(
        self, x_TD: Float[Array, "T D"], decision: ExpertChoice | Soft, bank, ctx: RoutingContext
    ) -> tuple[Float[Array, "T D"], dict[str, Stat]]:
        run = chosen if isinstance(decision, ExpertChoice) else mixed
        return run(x_TD, decision, bank), {}


def chosen(x_TD: Float[Array, "T D"], decision: ExpertChoice, bank) -> Float[Array, "T D"]:
    """y_t = sum over the experts that chose t of gate * E_e(x_t); a token that nobody chose gets zero."""
    (T, D), (G, E, C) = x_TD.shape, decision.tokens.shape
    S = T // G
    flat_GEC = decision.tokens + (jnp.arange(G, dtype=jnp.int32) * S)[:, None, None]
    flat_EN = jnp.where(decision.tokens < S, flat_GEC, T).swapaxes(0, 1).reshape(E, G * C)
    gates_EN = decision.gates.swapaxes(0, 1).reshape(E, G * C)
    with jax.named_scope("dispatch"):
        x_END = x_TD.at[flat_EN].get(mode="fill", fill_value=0)
    with jax.named_scope("experts"):
        y_END = bank.batched(x_END)
    with jax.named_scope("combine"):
        weighted = (y_END * gates_EN[..., None].astype(y_END.dtype)).reshape(E * G * C, D)
        return jnp.zeros((T, D), y_END.dtype).at[flat_EN.reshape(-1)].add(weighted, mode="drop")


def mixed(x_TD: Float[Array, "T D"], decision: Soft, bank) -> Float[Array, "T D"]:
    """Slots are mixtures of tokens by `dispatch`, tokens mixtures of slots by `combine`."""
    G, S, E, C = decision.dispatch.shape
    x_GSD = x_TD.reshape(G, S, -1)
    with jax.named_scope("dispatch"):
        x_EGCD = jnp.einsum("gsec,gsd->egcd", decision.dispatch.astype(x_TD.dtype), x_GSD)
    with jax.named_scope("experts"):
        y_EGCD = bank.batched(x_EGCD.reshape(E, G * C, -1)).reshape(x_EGCD.shape)
    with jax.named_scope("combine"):
        return jnp.einsum("gsec,egcd->gsd", decision.combine.astype(x_TD.dtype), y_EGCD).reshape(x_TD.shape)
