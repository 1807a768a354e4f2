"""The copies of the row kernel (_tpu_rows.py), and what it knows and holds: tiles, operands, buffers.

Each function that makes copies gives a list of them, for `start` or `wait`: a wait needs the sizes of what was started.
Dims as in _tpu_rows.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels import _tpu_schedule as schedule

Ref = Any
Scalar = schedule.Scalar
#: (products, sides) -> outputs: float32 arrays of one shape. Hashable, and equal if it does the same.
End = Callable[[list[Array], list[Array]], tuple[Array, ...]]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """rows, cols: tile of the outputs. body_rows, body_cols: what one straight run of the matrix units multiplies.

    `body_rows` lists one length, or a long and a short one. All lengths are multiples of 16, `body_cols` of 128.
    Beyond `deep_rows` rows of a group, all `weight_buffers` may be in use, before that `usual_weights`.
    gather_rows: copies of single rows that a straight run of the matrix units starts on the way; a multiple of 8.
    """

    rows: int
    cols: int
    body_rows: tuple[int, ...]
    body_cols: int
    weight_buffers: int
    usual_weights: int
    deep_rows: int
    row_buffers: int
    out_buffers: int
    zero_rows: int
    gather_rows: int
    vmem_limit_bytes: int

    def num_col_tiles(self, N: int) -> int:
        return -(-N // self.cols)


@dataclasses.dataclass(frozen=True)
class Static:
    """What the kernel knows while it is compiled."""

    R: int
    K: int
    N: int
    G: int
    num_rows: int
    num_weights: int
    scale_of: tuple[str | None, ...]
    num_sides: int
    num_outs: int
    transpose: bool
    fragment: int
    num_cores: int
    gather: bool
    pack_outs: bool
    tiles: Tiles
    end: End

    def spread(self, scales: tuple[Any, ...]) -> tuple[Any, ...]:
        """One for each of the weights, None where it has no scale."""
        given = iter(scales)
        return tuple(next(given) if of else None for of in self.scale_of)

    def out_cols(self, cols: int, dtype: Any) -> int:
        """Numbers per row in `cols` columns of an output."""
        return cols // 2 if self.pack_outs and jnp.dtype(dtype).itemsize == 2 else cols


@dataclasses.dataclass(frozen=True)
class Refs:
    """Operands in HBM, sizes in SMEM, buffers in VMEM, and their semaphores."""

    sizes: Ref
    token: Ref | None
    rows: tuple[Ref, ...]
    weights: tuple[Ref, ...]
    scales: tuple[Ref | None, ...]
    sides: tuple[Ref, ...]
    outs: tuple[Ref, ...]
    table: schedule.RowTable
    x: Ref
    unpacked: Ref
    w_scales: tuple[Ref | None, ...]
    w: Ref
    side: Ref
    y: Ref
    carry: Ref
    edge: Ref
    zeros: Ref
    y_rows: Ref
    w_sem: Ref
    x_sem: Ref
    y_sem: Ref
    edge_sem: Ref
    zero_sem: Ref


class Lead(NamedTuple):
    """The tile whose rows are to be gathered during a multiplication, if there is one."""

    at: schedule.Cursor
    slot: Scalar
    exists: Array


def start(copies: list[Any]) -> None:
    for copy in copies:
        copy.start()


def wait(copies: list[Any]) -> None:
    for copy in copies:
        copy.wait()


def _columns(s: Static, n):
    """The column tile n. The last one is moved back so that it ends with the array."""
    first = n * s.tiles.cols
    if s.N % s.tiles.cols:
        first = jnp.minimum(first, s.N - s.tiles.cols)
    return slice(None) if s.tiles.cols == s.N else pl.ds(pl.multiple_of(first, 128), s.tiles.cols)


def _out_at(s: Static, r: Refs, out: Ref, rows, n) -> Ref:
    """Rows of the column tile n of an output."""
    if not s.pack_outs:
        return out.at[rows, _columns(s, n)]
    cols = r.zeros.shape[1]
    return out.at[rows, 0, slice(None) if s.tiles.cols == s.N else pl.ds(pl.multiple_of(n * cols, 128), cols)]


def weights(s: Static, r: Refs, g, n, slot) -> list[Any]:
    cols = _columns(s, n)
    src = lambda w: w.at[g, cols, :] if s.transpose else w.at[g, :, cols]
    pairs = [(src(w), r.w.at[slot, p]) for p, w in enumerate(r.weights)]
    for of, scale, w_scale in zip(s.scale_of, r.scales, r.w_scales):
        if of:
            pairs.append((scale.at[g, :, cols if of == "outer" else slice(None)], w_scale.at[slot]))
    return [pltpu.make_async_copy(src, dst, r.w_sem.at[slot]) for src, dst in pairs]


def tile_rows(s: Static, r: Refs, at: schedule.Cursor):
    """How many rows of a tile are copied: up to the end of the group, in whole fragments."""
    end = jnp.minimum(at.row + s.tiles.rows, schedule.round_up(r.table.end[at.j], s.fragment))
    if s.R % s.fragment:
        end = jnp.minimum(end, s.R)
    return pl.multiple_of(end - at.row, 8)


def row_tile(s: Static, r: Refs, at: schedule.Cursor, slot) -> list[Any]:
    """The copies of a tile's rows, unless they are gathered, and of the sides' part in its columns."""
    row, rows = pl.multiple_of(at.row, s.fragment), tile_rows(s, r, at)
    src, dst, sem, cols = pl.ds(row, rows), pl.ds(0, rows), r.x_sem.at[slot], _columns(s, at.n)
    dense = () if s.gather else r.rows
    copies = [pltpu.make_async_copy(x.at[src, :], r.x.at[slot, i, dst, :], sem) for i, x in enumerate(dense)]
    return copies + [
        pltpu.make_async_copy(a.at[src, cols], r.side.at[slot, i, dst, :], sem) for i, a in enumerate(r.sides)
    ]


def _gather_row(s: Static, r: Refs, at: schedule.Cursor, slot, first, i: int) -> Any:
    """The copy of row first + i of a tile. first is a multiple of 8."""
    src = r.rows[0].at[r.token[at.row + first + i]]
    dst = r.x.at[slot, jax.lax.shift_right_logical(first, 3) + i // 8, pl.ds(i % 8, 1), :]
    return pltpu.make_async_copy(src, dst, r.x_sem.at[slot])


def gather_some(s: Static, r: Refs, lead: Lead, first) -> None:
    """Starts copies of rows [first, first + gather_rows) of a tile, as far as it has them.

    Without branches: short conditions become predicates, so that the matrix units never wait for this.
    """
    rows = jnp.where(lead.exists, tile_rows(s, r, lead.at), 0)
    for i in range(s.tiles.gather_rows):

        @pl.when(first + i < rows)
        def _(i=i):
            _gather_row(s, r, lead.at, lead.slot, first, i).start()


def gather_rest(s: Static, r: Refs, at: schedule.Cursor, slot, first) -> None:
    """Starts copies of rows [first, end) of a tile. first is a multiple of 8."""
    if not s.gather:
        return

    def eight(k, _):
        for i in range(8):
            _gather_row(s, r, at, slot, first + k * 8, i).start()
        return 0

    rest = jnp.maximum(tile_rows(s, r, at) - first, 0)
    jax.lax.fori_loop(0, jax.lax.shift_right_logical(rest, 3), eight, 0)


def wait_gather(s: Static, r: Refs, at: schedule.Cursor, slot) -> None:
    """One wait for as many bytes as all the tile's rows have."""
    rows = r.x.at[slot, pl.ds(0, jax.lax.shift_right_logical(tile_rows(s, r, at), 3)), :, :]
    pltpu.make_async_copy(rows, rows, r.x_sem.at[slot]).wait()


def out(s: Static, r: Refs, n, row, rows, slot) -> list[Any]:
    dst = pl.ds(pl.multiple_of(row, s.fragment), rows)
    return [
        pltpu.make_async_copy(r.y.at[slot, o, pl.ds(0, rows), :], _out_at(s, r, out, dst, n), r.y_sem.at[slot])
        for o, out in enumerate(r.outs)
    ]


def wait_out(s: Static, r: Refs, slot) -> None:
    rows = pl.multiple_of(r.y_rows[slot], s.fragment)

    @pl.when(rows > 0)
    def _():
        wait(out(s, r, jnp.int32(0), jnp.int32(0), rows, slot))


def _edge(s: Static, r: Refs, n, row, rows) -> list[Any]:
    dst = pl.ds(pl.multiple_of(row, 8), rows)
    return [
        pltpu.make_async_copy(r.edge.at[o, pl.ds(0, rows), :], _out_at(s, r, out, dst, n), r.edge_sem.at[0])
        for o, out in enumerate(r.outs)
    ]


def _edge_rows(s: Static, whole_end):
    return pl.multiple_of(jnp.minimum(s.R - whole_end, s.fragment), 8)


def write_last_fragment(s: Static, r: Refs, at, end, whole_end) -> None:
    """Writes the fragment in which the last group ends, with zeros below."""

    @pl.when(whole_end < end)
    def _():
        rows = _edge_rows(s, whole_end)

        @pl.when(at.n > 0)
        def _():
            wait(_edge(s, r, jnp.int32(0), whole_end, rows))

        own = jax.lax.broadcasted_iota(jnp.int32, (s.fragment, 1), 0) < end - whole_end
        for o in range(s.num_outs):
            r.edge[o] = jnp.where(own, r.carry[o], 0).astype(r.edge.dtype)
        start(_edge(s, r, at.n, whole_end, rows))

    # The next column tile starts with zeros above its first row again.
    r.carry[...] = jnp.zeros_like(r.carry)


def drain(s: Static, r: Refs, count, rows: schedule.RowRange, last_row, core) -> None:
    """Zeros for the rows of no group at hand; then waits for every copy that is still on its way."""
    for slot in range(s.tiles.out_buffers):
        wait_out(s, r, slot)
    whole_end = schedule.round_down(last_row, s.fragment)

    @pl.when((count > 0) & (whole_end < last_row))
    def _():
        wait(_edge(s, r, jnp.int32(0), jnp.int32(0), _edge_rows(s, whole_end)))

    live_end = last_row if s.num_cores == 1 else rows.live_end
    head_end = schedule.round_down(rows.live_first, s.fragment)
    tail_first = jnp.where(live_end <= rows.live_first, head_end, schedule.round_up(live_end, s.fragment))
    # With several cores, the first fills the head and the last the tail.
    head_end = jnp.where(core == 0, head_end, 0)
    tail_first = jnp.where(core == s.num_cores - 1, jnp.minimum(tail_first, s.R), s.R)
    for waits in (False, True):
        for n in range(s.tiles.num_col_tiles(s.N)):
            _zero_rows(s, r, n, jnp.int32(0), head_end, waits)
            _zero_rows(s, r, n, tail_first, jnp.int32(s.R), waits)


def _zero_rows(s: Static, r: Refs, n: int, first, end, waits: bool) -> None:
    """Starts, or waits for, the copies of zeros to rows [first, end) of column tile n."""
    step = s.tiles.zero_rows

    def body(k, _):
        row = pl.multiple_of(first + k * step, 8)
        rows = pl.multiple_of(jnp.minimum(end - row, step), 8)
        for out in r.outs:
            src, dst = r.zeros.at[pl.ds(0, rows), :], _out_at(s, r, out, pl.ds(row, rows), n)
            copy = pltpu.make_async_copy(src, dst, r.zero_sem.at[0])
            copy.wait() if waits else copy.start()
        return 0

    jax.lax.fori_loop(0, jax.lax.div(end - first + step - 1, jnp.int32(step)), body, 0)
