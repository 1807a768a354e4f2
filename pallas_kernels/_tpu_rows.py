"""TPU kernel of row-wise products: rows sorted by group, times their group's matrices, with an elementwise end.

    out_o[r] = end_o(products[r], sides[r]),  products_p[r] = rows_p[r] @ weights_p[group of r]  (or its transpose)

One launch, no XLA ops around it. The scalar core lists the groups that have rows (_tpu_schedule.py) and walks over
(column tile, group, row tile). A group's matrices stay in VMEM, with all of their inner dim, while the group's rows
pass by, so a sum in float32 is complete before the elementwise end takes it, and only the end's outputs go to HBM.
Matrices of the next groups, row tiles and output tiles are copied ahead and behind, across all edges of the walk.

Rows: a tile's rows are multiplied in steps of `body_rows`, as many as the group needs. Rows of a step that belong to
other groups, or hold whatever the buffer held before, only reach their own output rows, and these are never written:
- Whole fragments go out by a copy of exactly as many rows.
- The last fragment of a group, if the group ends inside it, stays in VMEM (`carry`), and the next group puts these rows
  above its own. After the last group it is written with zeros below.
- Rows before the first and after the last group are filled from a buffer of zeros.

Gather: the rows may lie in any order in HBM, `token` telling which one is row r. Each then is a copy of its own, and
those for the tile after next are started between the instructions of the multiplication at hand, where they cost
nothing, as long as the multiplication reads from another buffer than they write to. A copy can address single rows of
32-bit numbers only, so 16-bit rows come packed (`pack_rows`). With `pack_outs` the outputs are laid out likewise.

Dims: R rows, K inner, N columns, G groups of the weights.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels import _tpu_row_copies as copies
from pallas_kernels import _tpu_schedule as schedule
from pallas_kernels._tpu_row_copies import End, Refs, Static, Tiles

Ref = Any
Scalar = schedule.Scalar
#: A column tile and an entry of the table: one group's matrices to hold.
Stage = tuple[Scalar, Scalar]


def multiply(
    rows: tuple[Array, ...],
    weights: tuple[Array, ...],
    scales: tuple[Array | None, ...],
    sides: tuple[Array, ...],
    sizes_L: Array,
    offset_1: Array,
    token_R: Array | None = None,
    *,
    dtype: Any,
    scale_of: tuple[str | None, ...],
    end: End,
    num_outs: int,
    transpose: bool,
    pack_outs: bool = False,
    tiles: Tiles,
    num_cores: int,
    name: str,
    interpret: Any,
) -> tuple[Array, ...]:
    """`num_outs` arrays (R, N) of `dtype`, the rows'; zeros in rows of no group.

    rows: one (R, K) for all weights, or one each. weights: (G, K, N), with `transpose` (G, N, K). sides: (R, N).
    Weights that are narrower than the rows are widened in VMEM. scales: for each of the weights None, or float32
    (G, 1, K) where scale_of is "inner", of the rows, or (G, 1, N) where it is "outer", of the products.
    R must be a multiple of 8. `offset_1` is int32[1]. With token_R (R,), rows is one array of packed rows, and row r is
    its row token[r]; all of token must be valid, of dead rows too. With pack_outs, outputs are those of `pack_rows`
    with block=tiles.body_cols; `cols` must divide N then.
    """
    G, gather = weights[0].shape[0], token_R is not None
    R = token_R.shape[0] if gather else rows[0].shape[0]
    N, K = weights[0].shape[1:] if transpose else weights[0].shape[:0:-1]
    s = Static(
        R, K, N, G, len(rows), len(weights), scale_of, len(sides), num_outs, transpose, schedule.fragment_rows(dtype),
        num_cores, gather, pack_outs, tiles, end,
    )  # fmt: skip
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    operands = (*rows, *weights, *(a for a in scales if a is not None), *sides)
    words = s.out_cols(N, dtype)
    out_dtype = dtype if words == N else jnp.int32
    out_shape = (R, 1, words) if pack_outs else (R, N)
    out = jax.ShapeDtypeStruct(out_shape, out_dtype, manual_axis_type=jax.typeof(rows[0]).manual_axis_type)
    return pl.pallas_call(
        functools.partial(_kernel, s),
        out_shape=[out] * num_outs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2 + gather,
            grid=(num_cores,),
            in_specs=[hbm] * len(operands),
            out_specs=[hbm] * num_outs,
            scratch_shapes=_scratch(s, rows[0], weights[0].dtype, dtype, out_dtype),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=tiles.vmem_limit_bytes, disable_bounds_checks=True
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * R * K * N * len(weights),
            transcendentals=0,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in operands) + num_outs * R * N * dtype.itemsize,
        ),
        name=name,
        interpret=interpret,
    )(sizes_L, offset_1, *([token_R] if gather else []), *operands)


def pack_rows(x_TK: Array, block: int | None = None) -> Array:
    """Rows that single copies can fetch: (T, 1, words), each contiguous in HBM.

    float32 as it is; 16-bit numbers as int32, in which column k of each block (of all K by default) lies below column
    k + block / 2.
    """
    if x_TK.dtype.itemsize == 4:
        return x_TK[:, None, :]
    half = (block or x_TK.shape[1]) // 2
    bits = jax.lax.bitcast_convert_type(x_TK, jnp.uint16)
    part = lambda first: bits[:, first : first + half].astype(jnp.uint32)
    words = [part(first) | part(first + half) << 16 for first in range(0, x_TK.shape[1], 2 * half)]
    return jax.lax.bitcast_convert_type(jnp.concatenate(words, axis=1), jnp.int32)[:, None, :]


def _scratch(s: Static, rows: Array, w_dtype: Any, dtype: Any, out_dtype: Any) -> list[Any]:
    t = s.tiles
    cols = s.out_cols(t.cols, dtype)
    x_shape = (t.rows // 8, 8) if s.gather else (s.num_rows, t.rows)
    w_shape = (t.cols, s.K) if s.transpose else (s.K, t.cols)
    return [
        *schedule.table_scratch(s.G),
        pltpu.VMEM((t.row_buffers, *x_shape, rows.shape[-1]), rows.dtype),
        pltpu.VMEM((t.rows, s.K) if s.gather else (8, 128), dtype),
        *(pltpu.VMEM((t.weight_buffers, 1, s.K if of == "inner" else t.cols), jnp.float32) for of in s.scale_of if of),
        pltpu.VMEM((t.weight_buffers, s.num_weights, *w_shape), w_dtype),
        pltpu.VMEM((t.row_buffers, max(s.num_sides, 1), t.rows if s.num_sides else 8, t.cols), dtype),
        pltpu.VMEM((t.out_buffers, s.num_outs, t.rows, cols), out_dtype),
        pltpu.VMEM((s.num_outs, s.fragment, cols), jnp.int32 if out_dtype == jnp.int32 else jnp.float32),
        pltpu.VMEM((s.num_outs, s.fragment, cols), out_dtype),
        pltpu.VMEM((t.zero_rows, cols), out_dtype),
        pltpu.SMEM((t.out_buffers,), jnp.int32),
        *(pltpu.SemaphoreType.DMA((n,)) for n in (t.weight_buffers, t.row_buffers, t.out_buffers, 1, 1)),
    ]


def _refs(s: Static, sizes: Ref, refs: tuple[Ref, ...]) -> Refs:
    token, refs = (refs[0], refs[1:]) if s.gather else (None, refs)
    num_scales = sum(of is not None for of in s.scale_of)

    def take(count: int) -> tuple[Ref, ...]:
        nonlocal refs
        taken, refs = refs[:count], refs[count:]
        return taken

    operands = map(take, (s.num_rows, s.num_weights, num_scales, s.num_sides, s.num_outs))
    rows, weights, scales, sides, outs = operands
    table, (x, unpacked), w_scales = schedule.RowTable(*take(3)), take(2), take(num_scales)
    return Refs(
        sizes, token, rows, weights, s.spread(scales), sides, outs, table, x, unpacked, s.spread(w_scales), *refs
    )


def _kernel(s: Static, sizes: Ref, offset_ref: Ref, *refs: Ref) -> None:
    r, t = _refs(s, sizes, refs), s.tiles
    core, offset = pl.program_id(0), offset_ref[0]
    rows = schedule.row_range(sizes, offset, s.G, s.R, s.fragment, core, s.num_cores)
    first_group = schedule.first_group(sizes, offset, s.G, rows)

    @pl.when(first_group < s.G)
    def _():
        copies.start(copies.weights(s, r, first_group, jnp.int32(0), 0))

    count, last_row = schedule.build_table(sizes, offset, s.G, rows, r.table)
    steps = schedule.count_tiles(r.table, count, t.rows, s.fragment) * t.num_col_tiles(s.N)
    lead = schedule.first_tile(r.table, s.fragment)
    for i in range(t.row_buffers - 1):

        @pl.when(i < steps)
        def _(lead=lead, i=i):
            copies.start(copies.row_tile(s, r, lead, i))
            copies.gather_rest(s, r, lead, i, jnp.int32(0))

        lead = schedule.next_tile(lead, r.table, count, t.rows, s.fragment)
    r.carry[...] = jnp.zeros_like(r.carry)
    r.zeros[...] = jnp.zeros_like(r.zeros)
    for i in range(t.out_buffers):
        r.y_rows[i] = 0
    zero = jnp.int32(0)
    walk = _Walk(
        at=schedule.first_tile(r.table, s.fragment),
        x_lead=lead,
        w_lead=_next_stage((zero, zero), count),
        w_held=zero + 1,
        x_slot=zero,
        x_lead_slot=zero + (t.row_buffers - 1),
        w_slot=zero,
        w_lead_slot=zero + (1 if t.weight_buffers > 1 else 0),
        y_slot=zero,
    )
    jax.lax.fori_loop(zero, steps, functools.partial(_step, s, r, count, steps), walk)
    copies.drain(s, r, count, rows, last_row, core)


class _Walk(NamedTuple):
    """Where the walk stands: the tile being multiplied, the next one to copy in, and the buffers they use.

    w_lead is the next stage to copy in, w_held the number of those asked for and not yet done with.
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


def _step(s: Static, r: Refs, count, steps, i, walk: _Walk) -> _Walk:
    """One row tile: keeps the copies ahead, multiplies, hands the results to copies."""
    t, at, x_slot, w_slot, y_slot = s.tiles, walk.at, walk.x_slot, walk.w_slot, walk.y_slot

    @pl.when(i + t.row_buffers - 1 < steps)
    def _():
        copies.start(copies.row_tile(s, r, walk.x_lead, walk.x_lead_slot))

    fetch = _fetch_weights(s, r, walk)
    first, end = r.table.first[at.j], r.table.end[at.j]
    opens, below = at.row <= first, at.row + t.rows
    closes = below >= end

    @pl.when(opens)
    def _():
        copies.wait(copies.weights(s, r, r.table.group[at.j], at.n, w_slot))

    copies.wait(copies.row_tile(s, r, at, x_slot))
    if s.gather:
        copies.wait_gather(s, r, at, x_slot)
        _unpack(s, r, at, x_slot)
    copies.wait_out(s, r, y_slot)
    lead = copies.Lead(walk.x_lead, walk.x_lead_slot, i + t.row_buffers - 1 < steps) if s.gather else None
    _multiply(s, r, x_slot, w_slot, y_slot, jnp.minimum(below, end) - at.row, lead)

    @pl.when(opens & (first > at.row))
    def _():
        own = jax.lax.broadcasted_iota(jnp.int32, (s.fragment, 1), 0) >= first - at.row
        for o in range(s.num_outs):
            y = r.y[y_slot, o, : s.fragment, :].astype(r.carry.dtype)
            r.y[y_slot, o, : s.fragment, :] = jnp.where(own, y, r.carry[o]).astype(r.y.dtype)

    # The end of a group inside a fragment: that fragment waits for the next group, or for the zeros after the last.
    whole_end = schedule.round_down(end, s.fragment)

    @pl.when(closes & (whole_end < end))
    def _():
        at_row = pl.multiple_of(whole_end - at.row, s.fragment)
        for o in range(s.num_outs):
            r.carry[o] = r.y[y_slot, o, pl.ds(at_row, s.fragment), :].astype(r.carry.dtype)

    @pl.when(closes & (at.j == count - 1))
    def _():
        copies.write_last_fragment(s, r, at, end, whole_end)

    y_rows = pl.multiple_of(jnp.where(closes, whole_end, below) - at.row, s.fragment)
    r.y_rows[y_slot] = y_rows

    @pl.when(y_rows > 0)
    def _():
        copies.start(copies.out(s, r, at.n, at.row, y_rows, y_slot))

    choose = lambda condition, new, old: jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
    return _Walk(
        at=schedule.next_tile(at, r.table, count, t.rows, s.fragment),
        x_lead=schedule.next_tile(walk.x_lead, r.table, count, t.rows, s.fragment),
        w_lead=choose(fetch, _next_stage(walk.w_lead, count), walk.w_lead),
        w_held=walk.w_held + fetch.astype(jnp.int32) - closes.astype(jnp.int32),
        x_slot=schedule.next_slot(x_slot, t.row_buffers),
        x_lead_slot=schedule.next_slot(walk.x_lead_slot, t.row_buffers),
        w_slot=choose(closes, schedule.next_slot(w_slot, t.weight_buffers), w_slot),
        w_lead_slot=choose(fetch, schedule.next_slot(walk.w_lead_slot, t.weight_buffers), walk.w_lead_slot),
        y_slot=schedule.next_slot(y_slot, t.out_buffers),
    )


def _fetch_weights(s: Static, r: Refs, walk: _Walk) -> Array:
    """Starts the copies of the next stage if it is time to. Returns whether it did.

    At most one stage per row tile, so that the row tiles behind it in the queue do not starve. More than the usual
    number are held only deep in a large group, where the HBM has time to spare: small groups to come will need it.
    """
    t = s.tiles
    deep = walk.at.row - r.table.first[walk.at.j] >= t.deep_rows
    may_hold = jnp.where(deep, t.weight_buffers, min(t.weight_buffers, t.usual_weights))
    fetch = (walk.w_held < may_hold) & (walk.w_lead[0] < t.num_col_tiles(s.N))

    @pl.when(fetch)
    def _():
        n, j = walk.w_lead
        copies.start(copies.weights(s, r, r.table.group[j], n, walk.w_lead_slot))

    return fetch


def _multiply(s: Static, r: Refs, x_slot, w_slot, y_slot, rows, lead: copies.Lead | None) -> None:
    """y[:rows] from x[:rows], rounded up to whole bodies: long ones, and short ones for what is left."""
    t = s.tiles
    blocks = t.cols // t.body_cols

    def body(row, length: int, run) -> int:
        def block(c, _):
            if lead is not None:
                copies.gather_some(s, r, lead, (run * blocks + c) * t.gather_rows)
            first = pl.multiple_of(c * t.body_cols, t.body_cols)
            cols = slice(None) if blocks == 1 else pl.ds(first, t.body_cols)
            width = s.out_cols(t.body_cols, r.unpacked.dtype)
            y_cols = slice(None) if blocks == 1 else pl.ds(pl.multiple_of(c * width, width), width)
            _body(s, r, x_slot, w_slot, y_slot, pl.ds(row, length), cols, y_cols)
            return 0

        return block(0, 0) if blocks == 1 else jax.lax.fori_loop(0, blocks, block, 0)

    long, short = t.body_rows[0], t.body_rows[-1]
    longs = jax.lax.div(rows + (short if short < long else long) - 1, jnp.int32(long))
    jax.lax.fori_loop(0, longs, lambda k, _: body(pl.multiple_of(k * long, long), long, k), 0)
    runs = longs
    if short < long:
        at = lambda k: pl.multiple_of(longs * long + k * short, short)
        shorts = jax.lax.div(rows - longs * long + (short - 1), jnp.int32(short))
        jax.lax.fori_loop(0, shorts, lambda k, _: body(at(k), short, longs + k), 0)
        runs = longs + shorts
    if lead is not None:

        @pl.when(lead.exists)
        def _():
            copies.gather_rest(s, r, lead.at, lead.slot, runs * (blocks * t.gather_rows))


def _body(s: Static, r: Refs, x_slot, w_slot, y_slot, rows, cols, y_cols) -> None:
    products = []
    for p in range(s.num_weights):
        x = r.unpacked[rows, :] if s.gather else r.x[x_slot, p if s.num_rows > 1 else 0, rows, :]
        w = r.w[w_slot, p, cols, :] if s.transpose else r.w[w_slot, p, :, cols]
        if s.scale_of[p] == "inner":
            x = (x * r.w_scales[p][w_slot]).astype(x.dtype)
        product = _dot(x, w.astype(x.dtype), s.transpose)
        products.append(product * r.w_scales[p][w_slot, :, cols] if s.scale_of[p] == "outer" else product)
    sides = [r.side[x_slot, i, rows, cols].astype(jnp.float32) for i in range(s.num_sides)]
    for o, value in enumerate(s.end(products, sides)):
        r.y[y_slot, o, rows, y_cols] = _pack(value) if r.y.dtype == jnp.int32 else value.astype(r.y.dtype)


def _pack(value):
    """A block of an output as `pack_rows` does it: both halves of its columns, rounded to bfloat16, in one word."""
    half = value.shape[1] // 2
    bits = jax.lax.bitcast_convert_type(value.astype(jnp.bfloat16).astype(jnp.float32), jnp.int32)
    return jax.lax.shift_right_logical(bits[:, :half], 16) | bits[:, half:]


def _unpack(s: Static, r: Refs, at: schedule.Cursor, slot) -> None:
    """Undoes `pack_rows` for a tile's rows. A bfloat16 is the upper half of the float32 of its value."""
    step, half = s.tiles.body_rows[-1], s.K // 2

    def some(k, _):
        rows = pl.ds(pl.multiple_of(k * step, step), step)
        words = r.x[slot, pl.ds(k * (step // 8), step // 8), :, :].reshape(step, -1)
        if words.dtype == jnp.float32:
            r.unpacked[rows, :] = words
            return 0
        wide = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)
        r.unpacked[rows, :half] = wide(words << 16)
        r.unpacked[rows, half:] = wide(words & jnp.int32(-65536))
        return 0

    jax.lax.fori_loop(0, jax.lax.div(copies.tile_rows(s, r, at) + (step - 1), jnp.int32(step)), some, 0)


def _dot(x, w, transpose: bool):
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((1,), (1 if transpose else 0,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32, precision=precision)


def _next_stage(stage: Stage, count) -> Stage:
    n, j = stage
    wraps = j + 1 >= count
    return n + wraps.astype(jnp.int32), jnp.where(wraps, 0, j + 1)
