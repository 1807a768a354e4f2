"""Where every chosen (token, expert) pair sits among R rows, and how tokens get there and back.

T tokens, K experts per token, R rows, E experts, C capacity.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels as ops
from moe_zoo.core.aux import Stat
from pallas_kernels.quantized import Weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowPlan:
    """`choice[r]` is the choice t * K + k of row r (T * K: empty row); `slot[t, k]` the row of that choice (R: dropped
    or none). They are inverse to each other, so every derivative is a gather.

    Rows lie expert after expert. Either `group_sizes` says how many each has (ragged), or every expert has the same
    number and `group_sizes` is None (batched).
    """

    choice: Int[Array, "R"]
    slot: Int[Array, "T K"]
    gates: Float[Array, "T K"]
    group_sizes: Int[Array, "E"] | None
    num_experts: int = dataclasses.field(metadata={"static": True})
    gate_on: str = dataclasses.field(default="output", metadata={"static": True})

    @property
    def num_rows(self) -> int:
        return self.choice.shape[0]

    def gather(self, x_TD: Float[Array, "T D"]) -> Float[Array, "R D"]:
        """The rows of `x` in expert order; empty rows are zero. Scaled by the gate with `gate_on="input"`."""
        x_RD = ops.gather_rows(x_TD, self.choice // self.slot.shape[1], self.slot)
        if self.gate_on == "input":
            x_RD = x_RD * self.row_gates()[:, None].astype(x_RD.dtype)
        return x_RD

    def combine(self, y_RD: Float[Array, "R D"]) -> Float[Array, "T D"]:
        """Sums each token's rows, weighted by the gates with `gate_on="output"`. No row: zero."""
        gates_TK = self.gates if self.gate_on == "output" else jnp.ones_like(self.gates)
        return ops.combine_rows(y_RD, self.slot, gates_TK, self.choice)

    def row_gates(self) -> Float[Array, "R"]:
        """The gate of every row, 0 for empty rows."""
        return ops.gather_rows(self.gates.reshape(-1, 1), self.choice, self.slot.reshape(-1, 1))[:, 0]

    def ffn(
        self, x_TD: Float[Array, "T D"], *weights: Weights | None, activation: str, group_offset: int | None = None
    ) -> Float[Array, "T D"]:
        """The network of `weights` (gate or None, up, down) on each token's ragged rows, in one op (`routed_ffn`)."""
        moved = self.group_sizes, self.choice, self.slot, self.gates
        how = dict(gate_on=self.gate_on, activation=activation, group_offset=group_offset)
        return ops.routed_ffn(x_TD, *weights, *moved, **how)

    def run(self, x_TD: Float[Array, "T D"], bank) -> Float[Array, "T D"]:
        """gather, compute, combine: by the bank in one op if the rows are ragged."""
        if self.group_sizes is not None:
            with jax.named_scope("experts"):
                return bank.routed(x_TD, self)
        with jax.named_scope("dispatch"):
            x_RD = self.gather(x_TD)
        with jax.named_scope("experts"):
            y_RD = bank.batched(x_RD.reshape(self.num_experts, -1, x_RD.shape[-1])).reshape(x_RD.shape)
        with jax.named_scope("combine"):
            return self.combine(y_RD)


def choice_of_row(slot_TK: Int[Array, "T K"], R: int) -> Int[Array, "R"]:
    """The inverse of `slot`, as RowPlan has it."""
    N = slot_TK.size
    slot_N, choice_N = slot_TK.reshape(-1), jnp.arange(N, dtype=jnp.int32)
    # the dropped ones each to a place of their own beyond the end: all indices are then unique
    target_N = jnp.where(slot_N < R, slot_N, R + choice_N)
    return jnp.full(R, N, jnp.int32).at[target_N].set(choice_N, mode="drop", unique_indices=True)


def move(live: Int[Array, ""], plan: RowPlan, x_TD, bank) -> tuple[Float[Array, "T D"], dict[str, Stat]]:
    """Runs the plan and reports how many of the `live` choices were dropped on the way."""
    return plan.run(x_TD, bank), dropped(live, (plan.slot < plan.num_rows).sum())


def dropped(live: Int[Array, ""], kept: Int[Array, ""]) -> dict[str, Stat]:
    """The share of live choices that found no row."""
    return {"dropped_fraction": Stat.mean((live - kept).astype(jnp.float32), live.astype(jnp.float32))}
