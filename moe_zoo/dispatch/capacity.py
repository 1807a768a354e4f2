"""Capacity dispatch (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961): C places per expert, the rest is dropped.

Places are given slot by slot: all first choices in token order, then all second choices, and so on. A token's fate
thus depends on earlier tokens of its group only, but the group is the whole batch unless `group="sequence"`.
"""

import dataclasses
import functools
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import pallas_kernels as ops
from moe_zoo.core.aux import Stat
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.schema import positive
from moe_zoo.dispatch.plan import RowPlan, choice_of_row, move


@dataclasses.dataclass(frozen=True)
class CapacityConfig:
    """`capacity_factor` cf: C = ceil(cf * K * T / E) in training, `eval_capacity_factor` otherwise (None: never drop).

    Never more than the T of a group: a token takes an expert at most once, so C = T cannot drop.
    """

    capacity_factor: float = 1.25
    eval_capacity_factor: float | None = None
    group: Literal["batch", "sequence"] = "batch"
    gate_on: Literal["output", "input"] = "output"

    def validate(self, path: str) -> None:
        positive(self, path, "capacity_factor", "eval_capacity_factor")


@dataclasses.dataclass(frozen=True)
class Capacity:
    """A fixed number of places per expert and a batched matmul; overflow is dropped and counted."""

    Config: ClassVar = CapacityConfig
    decisions: ClassVar = (TokenChoice,)

    config: CapacityConfig = CapacityConfig()

    def capacity(self, T: int, K: int, E: int, train: bool) -> int:
        """Places per expert in a group of T tokens."""
        factor = self.config.capacity_factor if train else self.config.eval_capacity_factor
        return T if factor is None else min(T, math.ceil(round(factor * K * T / E, 6)))

    def plan(self, decision: TokenChoice, ctx: RoutingContext) -> RowPlan:
        T, K = decision.experts.shape
        E = decision.num_experts
        G = ctx.batch if self.config.group == "sequence" else 1
        C = self.capacity(T // G, K, E, ctx.train)
        places = functools.partial(ops.expert_positions, num_experts=E, priority="choice")
        place_TK = jax.vmap(places)(decision.experts.reshape(G, T // G, K))[1].reshape(T, K)
        group_T1 = (jnp.arange(T, dtype=jnp.int32) // (T // G))[:, None]
        R = E * G * C
        kept_TK = decision.live() & (place_TK < C)
        slot_TK = jnp.where(kept_TK, (decision.experts * G + group_T1) * C + place_TK, R)
        return RowPlan(choice_of_row(slot_TK, R), slot_TK, decision.gates, None, E, self.config.gate_on)

    def __call__(
        self, x_TD: Float[Array, "T D"], decision: TokenChoice, bank, ctx: RoutingContext
    ) -> tuple[Float[Array, "T D"], dict[str, Stat]]:
        return move(decision.live().sum(), self.plan(decision, ctx), x_TD, bank)
