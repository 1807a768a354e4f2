"""Dropless dispatch (MegaBlocks, arXiv 2211.15841): rows sorted by expert, group sizes as data, nothing padded.

With a row budget the number of rows R is smaller than T*K: for routers whose tokens use a varying number of experts.
Live rows come first; if they exceed R, the smallest gates are dropped and counted. What is dropped then depends on the
whole batch, later tokens too: a budget that drops anything is not causal, and decoding, which drops nothing, differs.
"""

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels as ops
from moe_zoo.core.aux import Stat
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.decision import Dense, TokenChoice
from moe_zoo.core.schema import positive
from moe_zoo.dispatch import expert_parallel
from moe_zoo.dispatch.plan import RowPlan, choice_of_row, dropped, move


@dataclasses.dataclass(frozen=True)
class DroplessConfig:
    """`row_budget`: rows per token (R = ceil(row_budget * T)); None gives every choice its row. `max_active`: most
    experts of one token when the router's gates are dense (ReLU); None: all of them.

    `gate_on`: where the gate multiplies, the expert's output (usual) or its input (Llama-4).
    """

    row_budget: float | None = None
    max_active: int | None = None
    gate_on: Literal["output", "input"] = "output"

    def validate(self, path: str) -> None:
        positive(self, path, "row_budget", "max_active")


@dataclasses.dataclass(frozen=True)
class Dropless:
    """Every choice gets a row, sorted by expert; an optional row budget drops the smallest gates."""

    Config: ClassVar = DroplessConfig
    decisions: ClassVar = (TokenChoice, Dense)

    config: DroplessConfig = DroplessConfig()

    def plan(self, decision: TokenChoice, R: int | None = None) -> RowPlan:
        """Rows sorted by expert, cut to R (None: T * K)."""
        R = decision.experts.size if R is None else R
        group_sizes_E, row_TK = ops.expert_rows(decision.experts, decision.num_experts)
        slot_TK = jnp.minimum(row_TK, R)
        choice_R = choice_of_row(slot_TK, R)
        return RowPlan(choice_R, slot_TK, decision.gates, group_sizes_E, decision.num_experts, self.config.gate_on)

    def __call__(
        self, x_TD: Float[Array, "T D"], decision: TokenChoice | Dense, bank, ctx: RoutingContext
    ) -> tuple[Float[Array, "T D"], dict[str, Stat]]:
        live = decision.live().sum()
        if isinstance(decision, Dense):
            E = decision.gates.shape[-1]
            decision = decision.top(min(E, self.config.max_active or E))
        decision, R = self.within_budget(decision)
        if ctx.mesh is None or ctx.mesh.size == 1:
            return move(live, self.plan(decision, R), x_TD, bank)
        # the budget has been kept: which rows a shard gets is data, so its buffer must hold any of them
        y_TD = expert_parallel.run(ctx.mesh, self.plan, x_TD, decision, bank)
        return y_TD, dropped(live, decision.live().sum())

    def within_budget(self, decision: TokenChoice) -> tuple[TokenChoice, int]:
        """(the decision without the choices that exceed the budget, rows)."""
        T, K = decision.experts.shape
        budget = self.config.row_budget
        if budget is None or budget >= K:
            return decision, T * K
        R = math.ceil(budget * T)
        kept_N = keep_largest(decision.experts.reshape(-1), decision.gates.reshape(-1), R, decision.num_experts)
        return TokenChoice(kept_N.reshape(T, K), decision.gates, decision.num_experts), R


def keep_largest(expert_N: Int[Array, "N"], gate_N: Float[Array, "N"], R: int, E: int) -> Int[Array, "N"]:
    """Sends all but the R live choices with the largest |gate| to E (none). Ties go to earlier choices."""
    size_N = jnp.where(expert_N < E, jnp.abs(jax.lax.stop_gradient(gate_N)), -1.0)
    _, best_R = jax.lax.top_k(size_N, R)
    kept_N = jnp.zeros(expert_N.shape, bool).at[best_R].set(True)
    return jnp.where(kept_N, expert_N, E)
