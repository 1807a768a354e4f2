"""Loops over the row tiles of one group, for CPUs: static shapes, work that follows the data.

A group's rows are covered by one short tile (for each of a few lengths, a loop of one trip or none) and then by full
tiles (a loop whose trip count is data). The short tile may stick out of its group: its body gets a mask of its rows.
Loops of no trip rather than `lax.switch`: through a conditional, XLA's CPU compiler (jaxlib 0.10.2) copies every large
array of the carry. The short tile first, so that the sums of a group start from its product and need no zeros.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels import _checks
from pallas_kernels.quantized import Quantized, Weights


@dataclasses.dataclass(frozen=True)
class TileSizes:
    """`rows` per full tile; short tiles have step, 2 * step, .. rows. `step` must divide `rows`.

    Each length is one more copy of the loop body to compile (about 0.25 CPU s for a fused layer's two passes).
    """

    rows: int
    step: int


def tile_sizes(num_rows: int, num_groups: int) -> TileSizes:
    """Eight lengths; the step follows the mean group, as what a group wastes is half a step.

    Measured (scripts/bench.py) for groups of 64 to 512 rows and widths of 128 to 512: 16 rows still feed a dot, beyond
    512 nothing is gained.
    """
    power_of_two = 1 << max((num_rows // num_groups // 8).bit_length() - 1, 0)
    step = min(max(16, power_of_two), 64)
    return TileSizes(rows=8 * step, step=step)


def for_each_group(
    starts_G: Int[Array, " G"], ends_G: Int[Array, " G"], body: Callable[..., Any], carry: Any, *, skip_empty: bool
) -> Any:
    """Runs `carry = body(carry, g)` over the groups, or over those that have rows."""

    def group(g: Array, carry: Any) -> Any:
        if not skip_empty:
            return body(carry, g)
        # As for short tiles: a loop of no trip, and a body that seems to depend on it.
        trips = (ends_G[g] > starts_G[g]).astype(jnp.int32)
        return jax.lax.fori_loop(jnp.int32(0), trips, lambda i, c: body(c, g + i), carry)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(starts_G.shape[0]), group, carry)


def pick_group(weights_GAB: Weights, g: Int[Array, ""], dtype: Any) -> Weights:
    """The matrix of group g. A quantized one comes with values of `dtype`, its scale apart: for `dot`."""
    matrix = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, g, keepdims=False), weights_GAB)
    return dataclasses.replace(matrix, values=matrix.values.astype(dtype)) if isinstance(matrix, Quantized) else matrix


def dot(a: Array, b: Weights, contract: tuple[int, int]) -> Array:
    """Sums over a dim of a and one of b, in float32 at least."""
    if isinstance(b, Quantized):
        scale_1X = b.scale.reshape(1, -1)
        if b.scale.shape[contract[1]] > 1:
            return dot((a * scale_1X).astype(a.dtype), b.values, contract)
        return dot(a, b.values, contract) * scale_1X
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=_checks.accumulator(a.dtype))


def for_each_tile(
    start: Int[Array, ""], end: Int[Array, ""], num_rows: int, sizes: TileSizes, body: Callable[..., Any], carry: Any
) -> Any:
    """Runs `carry = body(carry, first_row, rows, live, opens)` over the tiles of rows [start, end).

    `rows` is static. `live` is None where all rows of the tile belong to the group, else bool[rows, 1].
    `opens` (static) is True for the short tile, which every group that has rows begins with, and only for it.
    """
    count = end - start
    full = jnp.maximum(count - 1, 0) // sizes.rows
    short_end = end - full * sizes.rows
    lengths = sorted({min(k, num_rows) for k in range(sizes.step, sizes.rows + 1, sizes.step)})
    index = jnp.minimum((short_end - start + sizes.step - 1) // sizes.step, len(lengths))
    for k, rows in enumerate(lengths):

        def short(i, carry, rows=rows):
            # i is 0, but the compiler must not know: it would hoist the whole body out of the loop and always run it.
            # A slice that would pass the last row is moved back: then it begins with rows of an earlier group.
            at = jnp.minimum(start + i * rows, num_rows - rows)
            row = at + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
            live: Bool[Array, "rows 1"] = (row >= start) & (row < short_end)
            return body(carry, at, rows, live, True)

        carry = jax.lax.fori_loop(jnp.int32(0), (index == k + 1).astype(jnp.int32), short, carry)
    if num_rows <= sizes.rows:
        return carry
    return jax.lax.fori_loop(
        jnp.int32(0), full, lambda i, c: body(c, short_end + i * sizes.rows, sizes.rows, None, False), carry
    )


def take_rows(x: Array, first_row: Int[Array, ""], rows: int, live: Array | None = None) -> Array:
    """Rows [first_row, first_row + rows), zero where not live (whatever they hold, NaN too)."""
    tile = jax.lax.dynamic_slice_in_dim(x, first_row, rows)
    return tile if live is None else jnp.where(live, tile, 0)


def put_rows(out: Array, tile: Array, first_row: Int[Array, ""], live: Array | None) -> Array:
    """Writes the live rows of `tile` into `out` at first_row, in place inside a loop."""
    tile = tile.astype(out.dtype)
    if live is not None:
        tile = jnp.where(live, tile, jax.lax.dynamic_slice_in_dim(out, first_row, tile.shape[0]))
    return jax.lax.dynamic_update_slice_in_dim(out, tile, first_row, 0)


def add_matrix(sum_AB: Array, matrix_AB: Array, opens: bool) -> Array:
    """sum + matrix, or just the matrix for the tile which opens the group: the sum needs no zeros before it."""
    return matrix_AB if opens else sum_AB + matrix_AB


def put_matrix(out_GAB: Array, sum_AB: Array, g: Int[Array, ""], group_has_rows: Bool[Array, ""]) -> Array:
    """out[g] = sum, in place inside a loop; zeros for a group that no tile has opened."""
    matrix_AB = jnp.where(group_has_rows, sum_AB, 0).astype(out_GAB.dtype)
    return jax.lax.dynamic_update_index_in_dim(out_GAB, matrix_AB, g, 0)


def transposed(tile: Array) -> Array:
    """The tile's transpose, really written out.

    Left to itself XLA folds the transpose into the dot that uses it, and runs a dot that contracts the first dim of its
    left side outside its fast library (jaxlib 0.10.2 and 0.12). Pays where two dots share the transpose.
    """
    return jax.lax.optimization_barrier(tile.T)
