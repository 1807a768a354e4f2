"""Capacity dispatch (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961): C places per expert, the rest is dropped.

Places are given slot by slot: all first choices in token order, then all second choices, and so on. A token's fate
thus depends on earlier tokens of its group only, but the group is the whole batch unless `group="sequence"`.

Batch-prioritised routing (V-MoE, arXiv 2106.05974) takes tokens by their largest gate instead, so that drops hit those
that care least. What is dropped then depends on later tokens too: not causal where it drops.
"""

import dataclasses
import functools
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels as ops
from moe_zoo.core.aux import Stat
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.schema import positive
from moe_zoo.dispatch.plan import RowPlan, choice_of_row, move


@dataclasses.dataclass(frozen=True)
class CapacityConfig:
    """`capacity_factor` cf: C = ceil(cf * K * T / E) in training, `eval_capacity_factor` otherwise (None: never drop).
    `rounding` "even": down, and from there up to an even number; `min_capacity`: no fewer places (both ColossalAI's).
    `priority`: which tokens are served first, those that come first ("order") or those with the largest gate ("gate").
    `expert_capacity`: so many places, in training and otherwise, however many tokens there are.

    Never more than the T of a group: a token takes an expert at most once, so C = T cannot drop.
    """

    capacity_factor: float = 1.25
    eval_capacity_factor: float | None = None
    group: Literal["batch", "sequence"] = "batch"
    priority: Literal["order", "gate"] = "order"
    gate_on: Literal["output", "input"] = "output"
    rounding: Literal["up", "even"] = dataclasses.field(default="up", metadata={"silent": True})
    min_capacity: int = dataclasses.field(default=1, metadata={"silent": True})
    expert_capacity: int | None = dataclasses.field(default=None, metadata={"silent": True})

    def validate(self, path: str) -> None:
        positive(self, path, "capacity_factor", "eval_capacity_factor", "min_capacity", "expert_capacity")


@dataclasses.dataclass(frozen=True)
class Capacity:
    """A fixed number of places per expert and a batched matmul; overflow is dropped and counted."""

    Config: ClassVar = CapacityConfig
    decisions: ClassVar = (TokenChoice,)

    config: CapacityConfig = CapacityConfig()

    def capacity(self, T: int, K: int, E: int, train: bool) -> int:
        """Places per expert in a group of T tokens."""
        if self.config.expert_capacity is not None:
            return min(T, self.config.expert_capacity)
        factor = self.config.capacity_factor if train else self.config.eval_capacity_factor
        if factor is None:
            return T
        places = round(factor * K * T / E, 6)
        C = math.ceil(places) if self.config.rounding == "up" else 2 * math.ceil(math.floor(places) / 2)
        return min(T, max(C, self.config.min_capacity))

    def plan(self, decision: TokenChoice, ctx: RoutingContext) -> RowPlan:
        T, K = decision.experts.shape
        E = decision.num_experts
        G = ctx.batch if self.config.group == "sequence" else 1
        C = self.capacity(T // G, K, E, ctx.train)
        in_groups = lambda x_TK: x_TK.reshape(G, T // G, K)
        places = functools.partial(self.places, E=E)
        place_TK = jax.vmap(places)(in_groups(decision.experts), in_groups(decision.gates)).reshape(T, K)
        group_T1 = (jnp.arange(T, dtype=jnp.int32) // (T // G))[:, None]
        R = E * G * C
        kept_TK = decision.live() & (place_TK < C)
        slot_TK = jnp.where(kept_TK, (decision.experts * G + group_T1) * C + place_TK, R)
        return RowPlan(choice_of_row(slot_TK, R), slot_TK, decision.gates, None, E, self.config.gate_on)

    def places(self, experts_TK: Int[Array, "T K"], gates_TK: Float[Array, "T K"], E: int) -> Int[Array, "T K"]:
        """How many choices of a group are served before each at its expert."""
        if self.config.priority == "order":
            return ops.expert_positions(experts_TK, E, priority="choice")[1]
        eager_T = jnp.argsort(-jax.lax.stop_gradient(gates_TK).max(1), stable=True)
        place_TK = ops.expert_positions(experts_TK[eager_T], E, priority="choice")[1]
        return jnp.zeros_like(place_TK).at[eager_T].set(place_TK, unique_indices=True)

    def __call__(
        self, x_TD: Float[Array, "T D"], decision: TokenChoice, bank, ctx: RoutingContext
    ) -> tuple[Float[Array, "T D"], dict[str, Stat]]:
        return move(decision.live().sum(), self.plan(decision, ctx), x_TD, bank)
