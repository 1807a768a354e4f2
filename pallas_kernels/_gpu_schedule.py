"""Which rows a program of a GPU kernel works on, found inside the kernel from the group sizes alone.

Every program loads the sizes and sums them up in registers: no XLA op runs before the kernel, and no table is written.
A row tile belongs to one group. The rows behind the last group are one more group, without a matrix.

Dims: M rows, G groups of the weights, L >= G groups in the sizes, P the least power of two that exceeds L.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

Ref = Any
Scalar = Int[Array, ""]


class RowTile(NamedTuple):
    """Rows [row, end) of one group, of which a tile takes the first.

    group: index into the weights; 0 if they hold no matrix for these rows.
    held: whether they do.
    end: of the group; not beyond row if there are no rows.
    """

    group: Scalar
    held: Any
    row: Scalar
    end: Scalar


def num_row_tiles(num_rows: int, num_groups: int, rows: int) -> int:
    """The most tiles that any sizes of this many groups (and the rest) can need."""
    return (num_rows + (num_groups + 1) * (rows - 1)) // rows


def row_tile(
    sizes: Ref, offset: Scalar, tile: Scalar, *, num_rows: int, num_groups: int, held_groups: int, rows: int
) -> RowTile:
    """Row tile number `tile`, of all groups' tiles in order."""
    size_P, start_P, index_P = _bounds(sizes, num_rows, num_groups)
    end_P = jax.lax.cumsum(jax.lax.div(size_P + (rows - 1), jnp.int32(rows)))
    group = jnp.sum((end_P <= tile).astype(jnp.int32), dtype=jnp.int32)
    at = lambda values_P: jnp.sum(jnp.where(index_P == group, values_P, 0), dtype=jnp.int32)
    within = tile - (at(end_P) - jax.lax.div(at(size_P) + (rows - 1), jnp.int32(rows)))
    held = (group >= offset) & (group < offset + held_groups) & (group < num_groups)
    start = at(start_P)
    return RowTile(jnp.where(held, group - offset, 0), held, start + within * rows, start + at(size_P))


def group_rows(sizes: Ref, group: Scalar, *, num_rows: int, num_groups: int) -> tuple[Scalar, Scalar]:
    """(first row, end row) of a group."""
    size_P, start_P, index_P = _bounds(sizes, num_rows, num_groups)
    at = lambda values_P: jnp.sum(jnp.where(index_P == group, values_P, 0), dtype=jnp.int32)
    start = at(start_P)
    return start, start + at(size_P)


def _bounds(sizes: Ref, num_rows: int, num_groups: int) -> tuple[Array, Array, Array]:
    """(size, first row, index) of the groups and of the rest; size 0 beyond."""
    index_P = jax.lax.broadcasted_iota(jnp.int32, (1 << num_groups.bit_length(),), 0)
    given_P = plgpu.load(sizes.at[jnp.minimum(index_P, num_groups - 1)], mask=index_P < num_groups, other=0)
    sum_P = jax.lax.cumsum(given_P)
    start_P = jnp.minimum(sum_P - given_P, num_rows)
    end_P = jnp.where(index_P < num_groups, jnp.minimum(sum_P, num_rows), num_rows)
    return jnp.where(index_P <= num_groups, end_P - start_P, 0), start_P, index_P


def swizzled(program: Scalar, tiles: int, columns: int, width: int) -> tuple[Scalar, Scalar]:
    """(tile, column) of a program: `width` tiles side by side per column, so that programs at work share operands.

    At any time the programs at work then cover about as many tiles as columns, and read each operand from L2.
    """
    band = jax.lax.div(program, jnp.int32(width * columns))
    within = program - band * (width * columns)
    height = jnp.minimum(tiles - band * width, width)
    column = jax.lax.div(within, height)
    return band * width + (within - column * height), column
