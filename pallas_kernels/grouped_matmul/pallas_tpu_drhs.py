"""TPU kernel of the weights' gradient: left.T @ right over each group's rows.

One launch. The walk is that of pallas_tpu_forward.py, over (tile of the gradient, group with rows, row tile). Both
operands contract their rows as they lie in HBM. A tile of the gradient is summed in float32 in VMEM while the group's
rows pass by, and goes out once, in its final dtype; groups without rows are filled from a buffer of zeros.

Rows of other groups would add to the sum, so here they do matter: a group's first and last fragment are cleaned in
VMEM after they arrive, by selection (they may hold NaN), and what is left of the last run is set to zero.

Dims as in api.py's weight_gradient: A columns of left, B of right; the gradient is (G, A, B).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels import _tpu_schedule as schedule
from pallas_kernels.grouped_matmul.pallas_tpu_tiles import DrhsTiles

Ref = Any
Scalar = schedule.Scalar


@dataclasses.dataclass(frozen=True)
class Static:
    """What the kernel knows while it is compiled."""

    M: int
    A: int
    B: int
    G: int
    fragment: int
    num_cores: int
    tiles: DrhsTiles

    @property
    def tiles_a(self) -> int:
        return -(-self.A // self.tiles.left_cols)

    @property
    def tiles_b(self) -> int:
        return -(-self.B // self.tiles.right_cols)


@dataclasses.dataclass(frozen=True)
class Refs:
    """Operands in HBM, sizes in SMEM, buffers in VMEM, and their semaphores."""

    sizes: Ref
    left: Ref
    right: Ref
    out: Ref
    table: schedule.RowTable
    x: Ref
    y: Ref
    sum: Ref
    w: Ref
    zeros: Ref
    x_sem: Ref
    w_sem: Ref
    zero_sem: Ref


def weight_gradient(
    left_MA: Array, right_MB: Array, sizes_L: Array, offset_1: Array, *, static: Static, interpret: Any
) -> Array:
    """(G, A, B). M must be a multiple of 8. `offset_1` is int32[1]."""
    s, t, dtype = static, static.tiles, left_MA.dtype
    scratch = [
        *schedule.table_scratch(s.G),
        pltpu.VMEM((t.row_buffers, t.rows, t.left_cols), dtype),
        pltpu.VMEM((t.row_buffers, t.rows, t.right_cols), dtype),
        pltpu.VMEM((t.left_cols, t.right_cols), jnp.float32),
        pltpu.VMEM((t.out_buffers, t.left_cols, t.right_cols), dtype),
        pltpu.VMEM((t.zero_rows, t.right_cols), dtype),
        *(pltpu.SemaphoreType.DMA((n,)) for n in (t.row_buffers, t.out_buffers, 1)),
    ]
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        functools.partial(_kernel, s),
        out_shape=jax.ShapeDtypeStruct((s.G, s.A, s.B), dtype, manual_axis_type=jax.typeof(left_MA).manual_axis_type),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(s.num_cores,), in_specs=[hbm, hbm], out_specs=hbm, scratch_shapes=scratch
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=t.vmem_limit_bytes),
        cost_estimate=pl.CostEstimate(
            flops=2 * s.M * s.A * s.B,
            transcendentals=0,
            bytes_accessed=(left_MA.size + right_MB.size + s.G * s.A * s.B) * dtype.itemsize,
        ),
        name="grouped_matmul_drhs",
        interpret=interpret,
    )(sizes_L, offset_1, left_MA, right_MB)


class _Walk(NamedTuple):
    """Where the walk stands: the row tile being summed, the next to copy in, their buffers, groups written so far."""

    at: schedule.Cursor
    lead: schedule.Cursor
    slot: Scalar
    lead_slot: Scalar
    out_slot: Scalar
    written: Scalar


def _kernel(s: Static, sizes: Ref, offset_ref: Ref, *refs: Ref) -> None:
    left, right, out, group, first, end, *buffers = refs
    r = Refs(sizes, left, right, out, schedule.RowTable(group, first, end), *buffers)
    core, offset, t = pl.program_id(0), offset_ref[0], s.tiles
    # Cores divide the tiles of the gradient: rows would have to be summed between them.
    tiles = s.tiles_a * s.tiles_b
    # lax.div: floor division would need the sign of its operands
    first_tile, end_tile = (jax.lax.div(jnp.int32(tiles * c), jnp.int32(s.num_cores)) for c in (core, core + 1))
    rows = schedule.row_range(sizes, offset, s.G, s.M, s.fragment)
    count, _ = schedule.build_table(sizes, offset, s.G, rows, r.table)
    steps = schedule.count_tiles(r.table, count, t.rows, s.fragment) * (end_tile - first_tile)
    start = schedule.first_tile(r.table, s.fragment)._replace(n=jnp.int32(first_tile))
    lead = start
    for i in range(t.row_buffers - 1):

        @pl.when(i < steps)
        def _(lead=lead, i=i):
            _start_rows(s, r, lead, i)

        lead = schedule.next_tile(lead, r.table, count, t.rows, s.fragment)
    r.zeros[...] = jnp.zeros_like(r.zeros)
    zero = jnp.int32(0)
    walk = _Walk(start, lead, zero, zero + (t.row_buffers - 1), zero, zero)
    walk = jax.lax.fori_loop(zero, steps, functools.partial(_step, s, r, count, steps), walk)
    for wait in (False, True):
        _empty_groups(s, r, offset, rows, first_tile, end_tile, wait)
    for i in range(t.out_buffers):

        @pl.when(i < walk.written)
        def _(i=i):
            _out(s, r, 0, zero, i).wait()


def _step(s: Static, r: Refs, count, steps, i, walk: _Walk) -> _Walk:
    """One row tile: keeps the copies ahead, adds to the sum, and after a group's last tile sends the sum out."""
    t, at = s.tiles, walk.at

    @pl.when(i + t.row_buffers - 1 < steps)
    def _():
        _start_rows(s, r, walk.lead, walk.lead_slot)

    first, end = r.table.first[at.j], r.table.end[at.j]
    below = at.row + t.rows
    opens, closes = at.row <= first, below >= end
    for copy in _rows(s, r, at, walk.slot):
        copy.wait()
    # Only a group's last tile has rows left for a short run: all others are full, and whole long runs.
    long, short = t.body_rows
    live_end = jnp.minimum(end, below) - at.row
    longs = jax.lax.div(live_end + (long - 1 - (short if short < long else 0)), jnp.int32(long))
    ends_short = live_end > longs * long
    cleared_end = longs * long + jnp.where(ends_short, short, 0)

    @pl.when(opens & (first > at.row))
    def _():
        _keep(s, r, walk.slot, 0, lambda row: row >= first - at.row)

    @pl.when(closes & (live_end < cleared_end))
    def _():
        _clear_rest(s, r, walk.slot, live_end, cleared_end)

    sums = longs - (closes & ~ends_short).astype(jnp.int32)
    row_of = lambda run: pl.multiple_of(run * long, long)
    jax.lax.fori_loop(0, sums, lambda k, _: _add(s, r, walk.slot, row_of(k), long, opens & (k == 0)), 0)

    @pl.when(closes)
    def _():
        @pl.when(walk.written >= t.out_buffers)
        def _():
            _out(s, r, 0, jnp.int32(0), walk.out_slot).wait()

        for length, is_last in ((long, ~ends_short), (short, ends_short))[: 2 if short < long else 1]:

            @pl.when(is_last)
            def _(length=length):
                _add(s, r, walk.slot, row_of(sums), length, opens & (sums == 0), out_slot=walk.out_slot)

        _out(s, r, r.table.group[at.j], at.n, walk.out_slot).start()

    return _Walk(
        at=schedule.next_tile(at, r.table, count, t.rows, s.fragment),
        lead=schedule.next_tile(walk.lead, r.table, count, t.rows, s.fragment),
        slot=schedule.next_slot(walk.slot, t.row_buffers),
        lead_slot=schedule.next_slot(walk.lead_slot, t.row_buffers),
        out_slot=jnp.where(closes, schedule.next_slot(walk.out_slot, t.out_buffers), walk.out_slot),
        written=walk.written + closes.astype(jnp.int32),
    )


def _keep(s: Static, r: Refs, slot, row, live) -> None:
    """Sets the rows of one fragment that are not live to zero."""
    keep = live(jax.lax.broadcasted_iota(jnp.int32, (s.fragment, 1), 0))
    for ref in (r.x, r.y):
        rows = ref[slot, pl.ds(row, s.fragment), :].astype(jnp.float32)
        ref[slot, pl.ds(row, s.fragment), :] = jnp.where(keep, rows, 0).astype(ref.dtype)


def _clear_rest(s: Static, r: Refs, slot, live_end, end) -> None:
    """Sets rows [live_end, end) to zero, of which only the first fragment holds live ones."""
    edge = schedule.round_down(live_end, s.fragment)
    _keep(s, r, slot, edge, lambda row: row < live_end - edge)
    after = edge + s.fragment

    def clear(k, _):
        rows = pl.ds(pl.multiple_of(after + k * s.fragment, s.fragment), s.fragment)
        for ref in (r.x, r.y):
            ref[slot, rows, :] = jnp.zeros((s.fragment, ref.shape[-1]), ref.dtype)
        return 0

    jax.lax.fori_loop(0, jax.lax.div(end - after, jnp.int32(s.fragment)), clear, 0)


def _add(s: Static, r: Refs, slot, row, length: int, opens, out_slot=None) -> int:
    """Adds one run of rows to the sum, or starts the sum with it. The last run of a group goes to the output."""
    t = s.tiles
    rows = pl.ds(row, length)
    precision = jax.lax.Precision.HIGHEST if r.x.dtype == jnp.float32 else None

    def block(c, _):
        cols = pl.ds(pl.multiple_of(c * t.body_cols, t.body_cols), t.body_cols)
        product = jax.lax.dot_general(
            r.x[slot, rows, cols],
            r.y[slot, rows, :],
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
            precision=precision,
        )
        total = jnp.where(opens, 0, r.sum[cols, :]) + product
        if out_slot is None:
            r.sum[cols, :] = total
        else:
            r.w[out_slot, cols, :] = total.astype(r.w.dtype)
        return 0

    return block(0, 0) if t.body_cols == t.left_cols else jax.lax.fori_loop(0, t.left_cols // t.body_cols, block, 0)


def _columns(total: int, cols: int, n):
    """Tile n of the columns. The last one is moved back so that it ends with the array."""
    if cols == total:
        return slice(None)
    first = n * cols
    if total % cols:
        first = jnp.minimum(first, total - cols)
    return pl.ds(pl.multiple_of(first, 128), cols)


def _tile(s: Static, n):
    """Columns of left and of right that tile n of the gradient belongs to."""
    a, b = (n, 0) if s.tiles_b == 1 else (jax.lax.div(n, jnp.int32(s.tiles_b)), jax.lax.rem(n, jnp.int32(s.tiles_b)))
    return _columns(s.A, s.tiles.left_cols, a), _columns(s.B, s.tiles.right_cols, b)


def _rows(s: Static, r: Refs, at: schedule.Cursor, slot):
    end = jnp.minimum(at.row + s.tiles.rows, schedule.round_up(r.table.end[at.j], s.fragment))
    if s.M % s.fragment:
        end = jnp.minimum(end, s.M)
    row, rows = pl.multiple_of(at.row, s.fragment), pl.multiple_of(end - at.row, 8)
    left_cols, right_cols = _tile(s, at.n)
    return tuple(
        pltpu.make_async_copy(src.at[pl.ds(row, rows), cols], dst.at[slot, pl.ds(0, rows), :], r.x_sem.at[slot])
        for src, dst, cols in ((r.left, r.x, left_cols), (r.right, r.y, right_cols))
    )


def _start_rows(s: Static, r: Refs, at: schedule.Cursor, slot) -> None:
    for copy in _rows(s, r, at, slot):
        copy.start()


def _out(s: Static, r: Refs, g, n, slot):
    left_cols, right_cols = _tile(s, n)
    return pltpu.make_async_copy(r.w.at[slot], r.out.at[g, left_cols, right_cols], r.w_sem.at[slot])


def _empty_groups(s: Static, r: Refs, offset, rows: schedule.RowRange, first_tile, end_tile, wait: bool) -> None:
    """Starts, or waits for, the copies of zeros to the gradient of the groups without rows."""
    step = s.tiles.zero_rows

    def fill(g, n):
        a, right_cols = _tile(s, n)
        first = 0 if isinstance(a, slice) else a.start

        def body(k, _):
            at = pl.ds(pl.multiple_of(first + k * step, step if isinstance(first, int) else 128), step)
            copy = pltpu.make_async_copy(r.zeros, r.out.at[g, at, right_cols], r.zero_sem.at[0])
            copy.wait() if wait else copy.start()
            return 0

        jax.lax.fori_loop(0, s.tiles.left_cols // step, body, 0)

    def group(g, row):
        row_end = jnp.minimum(row + r.sizes[offset + g], rows.end)

        @pl.when(row_end <= row)
        def _():
            jax.lax.fori_loop(first_tile, end_tile, lambda n, _: fill(g, n) or 0, 0)

        return jnp.maximum(row, row_end)

    jax.lax.fori_loop(0, s.G, group, rows.live_first)
