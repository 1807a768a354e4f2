"""TPU kernel of the grouped matmul: each row times its group's matrix, or the matrix's transpose, read in place.

One launch, no XLA ops around it. The scalar core lists the groups that have rows (_tpu_schedule.py) and walks over
(column tile, group, row tile). A group's matrix stays in VMEM while the group's rows pass by, with all of K, so that no
partial sum is stored and read again. Matrices of the next groups, row tiles and output tiles are copied ahead and
behind, across all edges of the walk.

Rows: a tile's rows are multiplied in steps of `body_rows`, as many as the group needs. Rows of a step that belong to
other groups, or hold whatever the buffer held before, only reach their own output rows, and these are never written:
- Whole fragments go out by a copy of exactly as many rows.
- The last fragment of a group, if the group ends inside it, stays in VMEM (`carry`), and the next group puts these rows
  above its own. After the last group it is written with zeros below.
- Rows before the first and after the last group are filled from a buffer of zeros.

Dims as in api.py; R rows of a tile, F rows of a fragment, C columns of a column tile.
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
from pallas_kernels import _tpu_zeros
from pallas_kernels.grouped_matmul.pallas_tpu_tiles import ForwardTiles

Ref = Any
Scalar = schedule.Scalar
#: A column tile and an entry of the table: one matrix tile to hold.
Stage = tuple[Scalar, Scalar]


@dataclasses.dataclass(frozen=True)
class Static:
    """What the kernel knows while it is compiled. scale: of what, "inner" or "outer" (see quantized.py), if any."""

    M: int
    K: int
    N: int
    G: int
    transpose_rhs: bool
    scale: str | None
    fragment: int
    num_cores: int
    tiles: ForwardTiles


@dataclasses.dataclass(frozen=True)
class Refs:
    """Operands in HBM, sizes in SMEM, buffers in VMEM, and their semaphores."""

    sizes: Ref
    lhs: Ref
    rhs: Ref
    scale: Ref | None
    out: Ref
    table: schedule.RowTable
    w_scale: Ref | None
    w: Ref
    x: Ref
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


def matmul(
    lhs_MK: Array,
    rhs: Array,
    scale_G1X: Array | None,
    sizes_L: Array,
    offset_1: Array,
    *,
    static: Static,
    out_dtype: Any,
    interpret: Any,
) -> Array:
    """out (M, N). M must be a multiple of 8. `offset_1` is int32[1]. `scale`, if any, is (G, 1, K) or (G, 1, N)."""
    s, t = static, static.tiles
    # Runs may read past the last row; what they make of it is not written.
    x_rows = s.M + -s.M % s.fragment + t.body_rows[0] if t.lhs_stays else t.rows
    w_shape = (t.cols, s.K) if s.transpose_rhs else (s.K, t.cols)
    scratch = [
        *schedule.table_scratch(s.G),
        *([pltpu.VMEM((t.weight_buffers, 1, t.cols if s.scale == "outer" else s.K), jnp.float32)] if s.scale else []),
        pltpu.VMEM((t.weight_buffers, *w_shape), rhs.dtype),
        pltpu.VMEM((t.lhs_buffers, x_rows, s.K), lhs_MK.dtype),
        pltpu.VMEM((t.out_buffers, t.rows, t.cols), out_dtype),
        pltpu.VMEM((s.fragment, t.cols), jnp.float32),
        pltpu.VMEM((s.fragment, t.cols), out_dtype),
        pltpu.VMEM((t.zero_rows, t.cols), out_dtype),
        pltpu.SMEM((t.out_buffers,), jnp.int32),
        *(pltpu.SemaphoreType.DMA((n,)) for n in (t.weight_buffers, t.lhs_buffers, t.out_buffers, 1, 1)),
    ]
    hbm, operands = pl.BlockSpec(memory_space=pltpu.HBM), [lhs_MK, rhs, *([scale_G1X] if s.scale else [])]
    itemsize = lambda a: jnp.dtype(a.dtype).itemsize
    return pl.pallas_call(
        functools.partial(_kernel, s),
        out_shape=jax.ShapeDtypeStruct((s.M, s.N), out_dtype, manual_axis_type=jax.typeof(lhs_MK).manual_axis_type),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(s.num_cores,),
            in_specs=[hbm] * len(operands),
            out_specs=hbm,
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=t.vmem_limit_bytes),
        cost_estimate=pl.CostEstimate(
            flops=2 * s.M * s.K * s.N,
            transcendentals=0,
            bytes_accessed=lhs_MK.size * itemsize(lhs_MK) + rhs.size * itemsize(rhs) + s.M * s.N * out_dtype.itemsize,
        ),
        name="grouped_matmul",
        interpret=interpret,
    )(sizes_L, offset_1, *operands)


def _kernel(s: Static, sizes: Ref, offset_ref: Ref, *refs: Ref) -> None:
    lhs, rhs, *refs = refs
    scale, refs = (refs[0], refs[1:]) if s.scale else (None, refs)
    out, group, first, end, *buffers = refs
    r = Refs(sizes, lhs, rhs, scale, out, schedule.RowTable(group, first, end), *([] if s.scale else [None]), *buffers)
    core, offset = pl.program_id(0), offset_ref[0]
    rows = schedule.row_range(sizes, offset, s.G, s.M, s.fragment, core, s.num_cores, s.tiles.least_rows)
    first_group = schedule.first_group(sizes, offset, s.G, rows)

    @pl.when(first_group < s.G)
    def _():
        for copy in _weights(s, r, first_group, jnp.int32(0), 0):
            copy.start()

    count, last_row = schedule.build_table(sizes, offset, s.G, rows, r.table)
    steps = schedule.count_tiles(r.table, count, s.tiles.rows, s.fragment) * s.tiles.num_col_tiles(s.N)
    lead = schedule.first_tile(r.table, s.fragment)
    for i in range(s.tiles.lhs_buffers - 1):

        @pl.when(i < steps)
        def _(lead=lead, i=i):
            _lhs(s, r, lead, i).start()

        lead = schedule.next_tile(lead, r.table, count, s.tiles.rows, s.fragment)
    if s.tiles.lhs_stays:
        _all_lhs(s, r).start()

    r.carry[...] = jnp.zeros_like(r.carry)
    r.zeros[...] = jnp.zeros_like(r.zeros)
    for i in range(s.tiles.out_buffers):
        r.y_rows[i] = 0
    zero = jnp.int32(0)
    walk = _Walk(
        at=schedule.first_tile(r.table, s.fragment),
        x_lead=lead,
        w_lead=_next_stage((zero, zero), count),
        w_held=zero + 1,
        x_slot=zero,
        x_lead_slot=zero + (s.tiles.lhs_buffers - 1),
        w_slot=zero,
        w_lead_slot=zero + 1,
        y_slot=zero,
    )
    for _ in range(s.tiles.usual_weights - 2):
        walk = _fetch_weights(s, r, count, walk, steps > 0)
    if s.tiles.lhs_stays:
        _all_lhs(s, r).wait()
    fill = _zero_fill(s, r)
    live_end = last_row if s.num_cores == 1 else rows.live_end
    all_zeros = fill.outside(rows.live_first, live_end, s.fragment, core, s.num_cores)
    step = functools.partial(_step, s, r, count, steps, fill.copies(all_zeros))
    walk, zeros = jax.lax.fori_loop(zero, steps, step, (walk, all_zeros))
    _drain(s, r, count, last_row, zeros, all_zeros)


class _Walk(NamedTuple):
    """Where the walk stands: the tile being multiplied, the next one to copy in, and the buffers they use.

    w_lead is the next matrix tile to copy in, w_held the number of those asked for and not yet done with.
    """

    at: schedule.Cursor
    x_lead: schedule.Cursor
    w_lead: Stage
    w_held: Scalar
    x_slot: Scalar
    x_lead_slot: Scalar
    w_slot: Scalar
    w_lead_slot: Scalar
    y_slot: Scalar


def _step(s: Static, r: Refs, count, steps, zero_copies, i, state):
    """One row tile: keeps the copies ahead, multiplies, hands the result to a copy. `state`: walk and zero fill."""
    walk, zeros = state
    t, at, x_slot, w_slot, y_slot = s.tiles, walk.at, walk.x_slot, walk.w_slot, walk.y_slot

    if not t.lhs_stays:

        @pl.when(i + t.lhs_buffers - 1 < steps)
        def _():
            _lhs(s, r, walk.x_lead, walk.x_lead_slot).start()

    # At most one matrix per row tile, so that the row tiles behind it in the queue do not starve. More than the usual
    # number are held only deep in a large group, where the HBM has time to spare: small groups to come will need it.
    deep = at.row - r.table.first[at.j] >= t.deep_rows
    walk = _fetch_weights(s, r, count, walk, walk.w_held < jnp.where(deep, t.weight_buffers, t.usual_weights))

    first, end = r.table.first[at.j], r.table.end[at.j]
    opens = at.row <= first
    below = at.row + t.rows
    closes = below >= end

    @pl.when(opens)
    def _():
        for copy in _weights(s, r, r.table.group[at.j], at.n, w_slot):
            copy.wait()

    if not t.lhs_stays:
        _lhs(s, r, at, x_slot).wait()
    _wait_out(s, r, y_slot)
    x_row = at.row if t.lhs_stays else 0
    _multiply(s, r, x_slot, x_row, w_slot, y_slot, jnp.minimum(below, end) - at.row)

    # The end of a group inside a fragment: that fragment waits for the next group, or for the zeros after the last.
    whole_end = schedule.round_down(end, s.fragment)
    _hand_over(s, r, at, y_slot, first, end, whole_end, opens, closes, is_last=at.j == count - 1)
    y_rows = pl.multiple_of(jnp.where(closes, whole_end, below) - at.row, s.fragment)
    r.y_rows[y_slot] = y_rows

    @pl.when(y_rows > 0)
    def _():
        _out(s, r, at.n, at.row, y_rows, y_slot).start()

    zeros = _zero_fill(s, r).start_share(zeros, zero_copies, steps)
    walk = _Walk(
        at=schedule.next_tile(at, r.table, count, t.rows, s.fragment),
        x_lead=schedule.next_tile(walk.x_lead, r.table, count, t.rows, s.fragment),
        w_lead=walk.w_lead,
        w_held=walk.w_held - closes.astype(jnp.int32),
        x_slot=schedule.next_slot(x_slot, t.lhs_buffers),
        x_lead_slot=schedule.next_slot(walk.x_lead_slot, t.lhs_buffers),
        w_slot=jnp.where(closes, schedule.next_slot(w_slot, t.weight_buffers), w_slot),
        w_lead_slot=walk.w_lead_slot,
        y_slot=schedule.next_slot(y_slot, t.out_buffers),
    )
    return walk, zeros


def _hand_over(s: Static, r: Refs, at, y_slot, first, end, whole_end, opens, closes, is_last) -> None:
    """Takes the rows above a group from the group before it, and leaves those below whole_end to the next."""

    @pl.when(opens & (first > at.row))
    def _():
        own = jax.lax.broadcasted_iota(jnp.int32, (s.fragment, 1), 0) >= first - at.row
        y = r.y[y_slot, : s.fragment, :].astype(jnp.float32)
        r.y[y_slot, : s.fragment, :] = jnp.where(own, y, r.carry[...]).astype(r.y.dtype)

    @pl.when(closes & (whole_end < end))
    def _():
        at_row = pl.multiple_of(whole_end - at.row, s.fragment)
        r.carry[...] = r.y[y_slot, pl.ds(at_row, s.fragment), :].astype(jnp.float32)

    @pl.when(closes & is_last)
    def _():
        _write_last_fragment(s, r, at, end, whole_end)


def _fetch_weights(s: Static, r: Refs, count, walk: _Walk, wanted) -> _Walk:
    """Asks for the next matrix tile, if wanted and if there is one. A buffer must be free."""
    n, j = walk.w_lead
    fetch = wanted & (n < s.tiles.num_col_tiles(s.N))

    @pl.when(fetch)
    def _():
        for copy in _weights(s, r, r.table.group[j], n, walk.w_lead_slot):
            copy.start()

    after = _next_stage(walk.w_lead, count)
    return walk._replace(
        w_lead=tuple(jnp.where(fetch, new, old) for new, old in zip(after, walk.w_lead)),
        w_held=walk.w_held + fetch.astype(jnp.int32),
        w_lead_slot=jnp.where(fetch, schedule.next_slot(walk.w_lead_slot, s.tiles.weight_buffers), walk.w_lead_slot),
    )


def _multiply(s: Static, r: Refs, x_slot, x_row, w_slot, y_slot, rows) -> None:
    """y[:rows] = x[:rows] @ w, rounded up to whole bodies: long ones, and short ones for what is left."""
    t = s.tiles

    def body(row, length: int) -> int:
        def block(c, _):
            cols = pl.ds(pl.multiple_of(c * t.body_cols, t.body_cols), t.body_cols)
            x = r.x[x_slot, pl.ds(pl.multiple_of(x_row + row, s.fragment), length), :]
            w = r.w[w_slot, cols, :] if s.transpose_rhs else r.w[w_slot, :, cols]
            if s.scale == "inner":
                x = (x * r.w_scale[w_slot]).astype(x.dtype)
            y = _dot(x, w.astype(x.dtype), s.transpose_rhs)
            if s.scale == "outer":
                y = y * r.w_scale[w_slot, :, cols]
            r.y[y_slot, pl.ds(row, length), cols] = y.astype(r.y.dtype)
            return 0

        if t.body_cols == t.cols:
            return block(0, 0)
        return jax.lax.fori_loop(0, t.cols // t.body_cols, block, 0)

    long, short = t.body_rows
    longs = jax.lax.div(rows + (long - 1 - t.short_runs * short), jnp.int32(long))
    jax.lax.fori_loop(0, longs, lambda k, _: body(pl.multiple_of(k * long, long), long), 0)
    if t.short_runs:
        left = rows - longs * long
        shorts = jax.lax.div(left + (short - 1), jnp.int32(short))
        jax.lax.fori_loop(0, shorts, lambda k, _: body(pl.multiple_of(longs * long + k * short, short), short), 0)


def _dot(x, w, transpose_rhs: bool):
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((1,), (1 if transpose_rhs else 0,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32, precision=precision)


def _columns(s: Static, n):
    """The column tile n. The last one is moved back so that it ends with the array."""
    first = n * s.tiles.cols
    if s.N % s.tiles.cols:
        first = jnp.minimum(first, s.N - s.tiles.cols)
    return slice(None) if s.tiles.cols == s.N else pl.ds(pl.multiple_of(first, 128), s.tiles.cols)


def _weights(s: Static, r: Refs, g, n, slot) -> list[Any]:
    cols = _columns(s, n)
    src = r.rhs.at[g, cols, :] if s.transpose_rhs else r.rhs.at[g, :, cols]
    copies = [pltpu.make_async_copy(src, r.w.at[slot], r.w_sem.at[slot])]
    if s.scale:
        src = r.scale.at[g, :, cols if s.scale == "outer" else slice(None)]
        copies.append(pltpu.make_async_copy(src, r.w_scale.at[slot], r.w_sem.at[slot]))
    return copies


def _next_stage(stage: Stage, count) -> Stage:
    n, j = stage
    wraps = j + 1 >= count
    return n + wraps.astype(jnp.int32), jnp.where(wraps, 0, j + 1)


def _all_lhs(s: Static, r: Refs):
    return pltpu.make_async_copy(r.lhs, r.x.at[0, : s.M, :], r.x_sem.at[0])


def _lhs(s: Static, r: Refs, at: schedule.Cursor, slot):
    end = jnp.minimum(at.row + s.tiles.rows, schedule.round_up(r.table.end[at.j], s.fragment))
    if s.M % s.fragment:
        end = jnp.minimum(end, s.M)
    row, rows = pl.multiple_of(at.row, s.fragment), pl.multiple_of(end - at.row, 8)
    return pltpu.make_async_copy(r.lhs.at[pl.ds(row, rows), :], r.x.at[slot, pl.ds(0, rows), :], r.x_sem.at[slot])


def _out(s: Static, r: Refs, n, row, rows, slot):
    row = pl.multiple_of(row, s.fragment)
    return pltpu.make_async_copy(
        r.y.at[slot, pl.ds(0, rows), :], r.out.at[pl.ds(row, rows), _columns(s, n)], r.y_sem.at[slot]
    )


def _wait_out(s: Static, r: Refs, slot) -> None:
    rows = pl.multiple_of(r.y_rows[slot], s.fragment)

    @pl.when(rows > 0)
    def _():
        _out(s, r, jnp.int32(0), 0, rows, slot).wait()


def _edge(s: Static, r: Refs, n, row, rows):
    return pltpu.make_async_copy(
        r.edge.at[pl.ds(0, rows), :], r.out.at[pl.ds(row, rows), _columns(s, n)], r.edge_sem.at[0]
    )


def _edge_rows(s: Static, whole_end):
    return pl.multiple_of(jnp.minimum(s.M - whole_end, s.fragment), 8)


def _write_last_fragment(s: Static, r: Refs, at, end, whole_end) -> None:
    """Writes the fragment in which the last group ends, with zeros below."""

    @pl.when(whole_end < end)
    def _():
        rows = _edge_rows(s, whole_end)

        @pl.when(at.n > 0)
        def _():
            _edge(s, r, 0, whole_end, rows).wait()

        own = jax.lax.broadcasted_iota(jnp.int32, (s.fragment, 1), 0) < end - whole_end
        r.edge[...] = jnp.where(own, r.carry[...], 0).astype(r.edge.dtype)
        _edge(s, r, at.n, whole_end, rows).start()

    # The next column tile starts with zeros above its first row again.
    r.carry[...] = jnp.zeros_like(r.carry)


def _zero_fill(s: Static, r: Refs) -> _tpu_zeros.Fill:
    def copy(n, row, rows):
        dst = r.out.at[pl.ds(row, rows), _columns(s, n)]
        return pltpu.make_async_copy(r.zeros.at[pl.ds(0, rows), :], dst, r.zero_sem.at[0])

    return _tpu_zeros.Fill(s.M, s.tiles.num_col_tiles(s.N), s.tiles.zero_rows, copy)


def _drain(s: Static, r: Refs, count, last_row, zeros: _tpu_zeros.Progress, all_zeros: _tpu_zeros.Progress) -> None:
    """Fills what is left to fill with zeros; then waits for every copy that is still on its way."""
    fill = _zero_fill(s, r)
    fill.start(zeros, fill.copies(zeros))
    for slot in range(s.tiles.out_buffers):
        _wait_out(s, r, slot)

    @pl.when((count > 0) & (schedule.round_down(last_row, s.fragment) < last_row))
    def _():
        _edge(s, r, 0, 0, _edge_rows(s, schedule.round_down(last_row, s.fragment))).wait()

    fill.wait(all_zeros)
