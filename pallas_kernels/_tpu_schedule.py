"""Row-exact schedules for TPU kernels on rows sorted by group, built by the scalar core inside the kernel.

A kernel walks over (column tile, group with rows, row tile). `build_table` lists the groups that have rows;
a `Cursor` is a place in the walk. One cursor leads (it starts copies), another follows (it computes), so copies run
ahead across the edges of groups and of column tiles.

HBM holds arrays in tiles of 8 rows (16 for 16-bit types on some generations), and a copy moves whole ones. So a
group's walk begins at its first row rounded down to a *fragment* of `fragment_rows` rows, and a fragment that holds the
end of one group and the start of the next is seen by both. Who writes it to HBM is the kernel's concern: see
grouped_matmul/pallas_tpu_forward.py, where the earlier group hands its rows to the later one.

All of it runs on scalars in SMEM: loops over groups have no branches, so a group costs about a dozen cycles.
Dims: G groups of the weights, L >= G groups in the sizes vector.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

Scalar = Int[Array, ""]


def fragment_rows(*dtypes: Any) -> int:
    """Rows of the smallest piece of an array that a copy or a vector load can address, for all of `dtypes`."""
    return max(32 // jnp.dtype(dtype).itemsize for dtype in dtypes)


def round_down(row: Scalar, rows: int) -> Scalar:
    return pl.multiple_of(row // rows * rows if isinstance(row, int) else row & ~(rows - 1), rows)


def round_up(row: Scalar, rows: int) -> Scalar:
    return round_down(row + rows - 1, rows)


class RowTable(NamedTuple):
    """The groups that have rows, in order: SMEM refs of length G + 1, of which the first `count` entries are valid."""

    group: Any
    first: Any
    end: Any


def table_scratch(num_groups: int) -> RowTable:
    """Scratch shapes for a RowTable. One more entry than groups: the builder writes before it knows whether to keep."""
    return RowTable(*(pltpu.SMEM((num_groups + 1,), jnp.int32) for _ in range(3)))


class RowRange(NamedTuple):
    """Rows [first, end) of the groups at hand, of the whole array: `live`; and this core's share: `mine`."""

    live_first: Scalar
    live_end: Scalar
    first: Scalar
    end: Scalar


def row_range(
    sizes_ref: Any,
    offset: Scalar,
    num_groups: int,
    num_rows: int,
    fragment: int,
    core: Scalar | int = 0,
    num_cores: int = 1,
    least_rows: int = 1,
) -> RowRange:
    """The rows of groups [offset, offset + num_groups), and the share of them that falls to `core`.

    Cores divide the rows at fragments, wherever groups end: a group at the border is worked on by both. A group counts
    as its rows, but at least as `least_rows`: the rows that take as long to multiply as its matrix to copy.
    """
    total = jax.lax.fori_loop(jnp.int32(0), offset, lambda i, row: row + sizes_ref[i], jnp.int32(0))
    first = jnp.minimum(total, num_rows)
    if num_cores == 1:
        # The end follows from the table. Summing here would delay the first copy.
        return RowRange(first, jnp.int32(num_rows), first, jnp.int32(num_rows))

    def walk(visit: Any, start: Any) -> Any:
        def body(g: Scalar, state: tuple[Scalar, Any]) -> tuple[Scalar, Any]:
            row, carry = state
            rows = jnp.minimum(sizes_ref[offset + g], num_rows - row)
            return row + rows, visit(row, rows, jnp.where(rows > 0, jnp.maximum(rows, least_rows), 0), carry)

        return jax.lax.fori_loop(jnp.int32(0), jnp.int32(num_groups), body, (first, start))

    end, total_cost = walk(lambda row, rows, cost, sum: sum + cost, jnp.int32(0))

    def border(c: Scalar | int) -> Scalar:
        share = jax.lax.div(total_cost, jnp.int32(num_cores)) * c

        def visit(row: Scalar, rows: Scalar, cost: Scalar, carry: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
            before, found = carry
            here = (before <= share) & (share < before + cost)
            return before + cost, jnp.where(here, row + jnp.minimum(share - before, rows), found)

        return jnp.clip(round_down(walk(visit, (jnp.int32(0), end))[1][1], fragment), first, end)

    mine_first = jnp.where(core == 0, first, border(core))
    mine_end = jnp.where(core == num_cores - 1, end, border(core + 1))
    return RowRange(first, end, mine_first, mine_end)


def first_group(sizes_ref: Any, offset: Scalar, num_groups: int, rows: RowRange) -> Scalar:
    """The first of the groups at hand with rows in [rows.first, rows.end), or num_groups. Cheap: before the table."""

    def row_end(g: Scalar, row: Scalar) -> Scalar:
        return jnp.minimum(row + sizes_ref[offset + jnp.minimum(g, num_groups - 1)], rows.end)

    def has_none(state: tuple[Scalar, Scalar]) -> Array:
        g, row = state
        return (g < num_groups) & (row_end(g, row) <= jnp.maximum(row, rows.first))

    return jax.lax.while_loop(has_none, lambda s: (s[0] + 1, row_end(*s)), (jnp.int32(0), rows.live_first))[0]


def build_table(
    sizes_ref: Any, offset: Scalar, num_groups: int, rows: RowRange, table: RowTable
) -> tuple[Scalar, Scalar]:
    """Fills `table` with the groups that have rows in [rows.first, rows.end). Returns their number and the last end."""

    def body(g: Scalar, state: tuple[Scalar, Scalar, Scalar]) -> tuple[Scalar, Scalar, Scalar]:
        row, count, last = state
        row_end = jnp.minimum(row + sizes_ref[offset + g], rows.end)
        first = jnp.maximum(row, rows.first)
        table.group[count], table.first[count], table.end[count] = g, first, row_end
        has_rows = row_end > first
        return jnp.maximum(row_end, row), count + has_rows.astype(jnp.int32), jnp.where(has_rows, row_end, last)

    start = (rows.live_first, jnp.int32(0), rows.first)
    _, count, last = jax.lax.fori_loop(jnp.int32(0), jnp.int32(num_groups), body, start)
    return count, last


def count_tiles(table: RowTable, count: Scalar, tile_rows: int, fragment: int) -> Scalar:
    """Row tiles of one pass over the groups."""

    def body(j: Scalar, tiles: Scalar) -> Scalar:
        rows = table.end[j] - round_down(table.first[j], fragment)
        return tiles + jax.lax.div(rows + tile_rows - 1, jnp.int32(tile_rows))

    return jax.lax.fori_loop(jnp.int32(0), count, body, jnp.int32(0))


class Cursor(NamedTuple):
    """A row tile in the walk: column tile `n`, entry `j` of the table, first row `row` (a multiple of the fragment)."""

    n: Scalar
    j: Scalar
    row: Scalar


def first_tile(table: RowTable, fragment: int) -> Cursor:
    return Cursor(jnp.int32(0), jnp.int32(0), round_down(table.first[0], fragment))


def next_tile(at: Cursor, table: RowTable, count: Scalar, tile_rows: int, fragment: int) -> Cursor:
    """The tile after `at`: further down in its group, or the top of the next group, or of the next column tile."""
    below = at.row + tile_rows
    group_done = below >= table.end[at.j]
    j = at.j + group_done.astype(jnp.int32)
    wraps = j >= count
    j = jnp.where(wraps, 0, j)
    row = jnp.where(group_done, round_down(table.first[j], fragment), below)
    return Cursor(at.n + wraps.astype(jnp.int32), j, pl.multiple_of(row, fragment))


def next_slot(slot: Scalar, slots: int) -> Scalar:
    """The buffer after `slot` in a ring."""
    return jnp.where(slot == slots - 1, 0, slot + 1)
