"""Rows of given choices, sorted by expert, in one Pallas TPU kernel without a sort.

Two passes over the ids: the first counts, which says where each expert's rows begin; the second numbers them. Dims and
layout as in pallas_tpu.py.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.route_top_k import pallas_tpu_counting as counting

_MOST_EXPERTS, _MOST_CHOICES_PER_TOKEN = 1024, 256


@dataclasses.dataclass(frozen=True)
class _Static:
    T: int
    K: int
    E: int
    block: int
    strip: int


def refusal(shape: tuple[int, int], num_experts: int) -> str | None:
    """Why the kernel cannot run this; None if it can."""
    T, K = shape
    if T * K == 0:
        return "there is no choice"
    if num_experts > _MOST_EXPERTS:
        return f"it holds the counts of at most {_MOST_EXPERTS} experts"
    if T * K >= counting.MOST_CHOICES or K > _MOST_CHOICES_PER_TOKEN:
        return f"it counts fewer than {counting.MOST_CHOICES} choices, of a token at most {_MOST_CHOICES_PER_TOKEN}"
    return None


def rows(experts_TK: Array, *, num_experts: int, interpret: bool = False) -> tuple[Array, Array]:
    """(choices per expert, rank of each choice when sorted by expert)."""
    (T, K), E = experts_TK.shape, num_experts
    strip = counting.strip_lanes(E, T)
    static = _Static(T, K, E, strip * max(1, min(4, T // strip)), strip)
    like = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(experts_TK).manual_axis_type)
    block = lambda index: pl.BlockSpec((K, static.block), index)
    counts, ranks = pl.pallas_call(
        functools.partial(_kernel, static),
        grid=(2, -(-T // static.block)),
        in_specs=[block(lambda p, i: (0, i))],
        # nothing is written in the first pass
        out_specs=[pl.BlockSpec((1, E), lambda p, i: (0, 0)), block(lambda p, i: (0, jnp.where(p == 0, 0, i)))],
        out_shape=[like((1, E), jnp.int32), like((K, T), jnp.int32)],
        scratch_shapes=[
            pltpu.VMEM((E, strip), jnp.float32),
            pltpu.VMEM((1, E), jnp.float32),
            pltpu.VMEM((K, strip), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=6 * T * K * E, transcendentals=0, bytes_accessed=12 * T * K + 4 * E),
        interpret=interpret,
        name="expert_rows",
    )(experts_TK.astype(jnp.int32).T)
    return counts[0], ranks.T


def _kernel(static: _Static, experts, counts, ranks, before, count_row, work) -> None:
    """`before`: earlier choices, in the second pass those of lower experts too; `work`: ids of a strip, then ranks."""
    phase, i = pl.program_id(0), pl.program_id(1)

    @pl.when((phase == 0) & (i == 0))
    def _():
        before[...] = jnp.zeros_like(before)
        count_row[...] = jnp.zeros_like(count_row)

    @pl.when((phase == 1) & (i == 0))
    def _():
        before[...] = counting.lower_experts(before[...])

    def strip(s: Array, lanes: Any) -> None:
        first = i * static.block + s * static.strip
        live_1W = first + jax.lax.broadcasted_iota(jnp.int32, (1, static.strip), 1) < static.T
        work[...] = jnp.where(live_1W, experts[:, lanes], static.E).astype(jnp.float32)

        def count(k: Any, sum_EW: Array) -> Array:
            return sum_EW + counting.hits(counting.row(work, k), static.E).astype(jnp.float32)

        count_EW = counting.for_each_k(static.K, count, jnp.zeros((static.E, static.strip), jnp.float32))

        @pl.when(phase == 0)
        def _():
            count_row[...] += counting.total_as_row(count_EW)

        @pl.when(phase == 1)
        def _():
            def place(k: Any, earlier_EW: Array) -> Array:
                expert_1W = counting.row(work, k)
                hit_EW = counting.hits(expert_1W, static.E)
                rank_1W = counting.sum_where(hit_EW, earlier_EW)
                counting.put_row(work, k, jnp.where(expert_1W == static.E, float(static.T * static.K), rank_1W))
                return earlier_EW + hit_EW.astype(jnp.float32)  # a token may choose an expert again

            counting.for_each_k(static.K, place, before[...] + counting.earlier(count_EW))
            ranks[:, lanes] = work[...].astype(jnp.int32)

        before[...] += counting.total(count_EW)

    counting.for_each_strip(static.block, static.strip, strip)
    counts[...] = count_row[...].astype(jnp.int32)
