"""GPU kernel (Pallas, Triton) of rows times their group's matrices: one launch, no XLA op around it.

A program owns one tile of rows, all of one group, and one of columns. It finds both in the group sizes
(_gpu_schedule.py), walks over the summed dim with tiles kept in registers, and stores the rows that are its group's:
nothing is computed twice, and no other group's work depends on it. Rows without a matrix get zero.

What is shared by the ops: several products may be summed or kept side by side, rows may be gathered on the way in, and
an epilogue turns the sums into what is stored. Dims: R rows of a tile, C columns, K summed, M rows, N columns.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels import _gpu_schedule as schedule
from pallas_kernels import quantized
from pallas_kernels._gpu_tiles import Tiles
from pallas_kernels.quantized import Weights

Ref = Any
#: (sums (R, C), loads of the row inputs (R, C), scale of the rows (R, 1) or None) -> tiles to store (R, C), then sums
#: of rows (R,). An iterator: what has been stored takes no registers any more.
Epilogue = Callable[[list[Array], list[Callable[[], Array]], Array | None], Iterable[Array]]


@dataclasses.dataclass(frozen=True)
class Product:
    """sums[to] += lhs[left] @ rhs[right] of the row's group, or its transpose."""

    left: int
    right: int
    to: int


@dataclasses.dataclass(frozen=True)
class Call:
    """What the kernel knows while it is compiled.

    phases: products whose operands are loaded together, one walk over K each.
    row_sums: further results: one float32 number per row and part of a column tile.
    parts: what the epilogue gets at a time, of a column tile: all of it may not fit into registers.
    """

    M: int
    K: int
    N: int
    G: int
    L: int
    phases: tuple[tuple[Product, ...], ...]
    transpose_rhs: bool
    tiles: Tiles
    out_dtypes: tuple[Any, ...]
    epilogue: Epilogue
    row_sums: int = 0
    parts: int = 1

    @property
    def num_cols(self) -> int:
        return -(-self.N // self.tiles.cols)


@dataclasses.dataclass(frozen=True)
class _Refs:
    sizes: Ref
    offset: Ref
    index: Ref | None
    lhs: list[Ref]
    rhs: list[Ref]
    inner: list[Ref]
    outer: list[Ref]
    rows: list[Ref]
    scale: Ref | None
    out: list[Ref]
    sums: list[Ref]


def matmul_rows(
    call: Call,
    lhs: Sequence[Array],
    rhs: Sequence[Weights],
    sizes_L: Array,
    offset: Array | None,
    *,
    index_M: Array | None = None,
    row_inputs: Sequence[Array] = (),
    scale_M: Array | None = None,
    interpret: bool = False,
) -> list[Array]:
    """(M, N) arrays, as many as call.out_dtypes, then (column tiles, M) of the row sums.

    lhs: (M, K) each; or (X, K), gathered by `index_M`, where X and above mean a row of zeros. rhs: (G, K, N) each, or
    (G, N, K). row_inputs: (M, N) each. Quantized matrices must be scaled alike.
    """
    scales = [quantized.scales(w, 2 if call.transpose_rhs else 1) for w in rhs]
    given = {
        "sizes": sizes_L.astype(jnp.int32),
        "offset": None if offset is None else offset.reshape(1),
        "index": index_M,
        "lhs": list(lhs),
        "rhs": [quantized.values(w) for w in rhs],
        "inner": [inner for inner, _ in scales if inner is not None],
        "outer": [outer for _, outer in scales if outer is not None],
        "rows": list(row_inputs),
        "scale": scale_M,
    }
    operands, tree = jax.tree.flatten(given)
    t, like = call.tiles, functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(lhs[0]).manual_axis_type)
    out_shape = [like((call.M, call.N), dtype) for dtype in call.out_dtypes]
    out_shape += [like((call.num_cols * call.parts, call.M), jnp.float32)] * call.row_sums
    num_tiles = schedule.num_row_tiles(call.M, call.L, t.rows)
    return pl.pallas_call(
        functools.partial(_kernel, call, num_tiles, tree),
        out_shape=out_shape,
        grid=(num_tiles * call.num_cols,),
        compiler_params=plgpu.CompilerParams(num_warps=t.warps, num_stages=t.stages),
        interpret=interpret,
        name="matmul_rows",
    )(*operands)


def _kernel(call: Call, num_tiles: int, tree: Any, *refs: Ref) -> None:
    given, out = jax.tree.unflatten(tree, refs[: tree.num_leaves]), refs[tree.num_leaves :]
    count = len(call.out_dtypes)
    r = _Refs(**given, out=list(out[:count]), sums=list(out[count:]))
    t = call.tiles
    tile, column = schedule.swizzled(pl.program_id(0), num_tiles, call.num_cols, t.width)
    offset = jnp.int32(0) if r.offset is None else r.offset[0]
    how = dict(num_rows=call.M, num_groups=call.L, held_groups=call.G, rows=t.rows)
    at = schedule.row_tile(r.sizes, offset, tile, **how)
    row_R = at.row + _iota(t.rows)
    sums = _sums(call, r, at, jnp.minimum(row_R, call.M - 1), column * t.cols + _iota(t.cols))
    parts = [jnp.split(total, call.parts, axis=1) if call.parts > 1 else [total] for total in sums]
    for i, part in enumerate(zip(*parts)):
        _finish(call, r, at, row_R, column * call.parts + i, list(part))


def _finish(call: Call, r: _Refs, at: schedule.RowTile, row_R: Array, column: Array, sums: list[Array]) -> None:
    """Stores what the epilogue makes of some columns of the sums: part number `column` of the row tile."""
    cols = call.tiles.cols // call.parts
    col_C, live_R1 = column * cols + _iota(cols), (row_R < at.end)[:, None]
    tile_at = (row_R[:, None], col_C[None, :])
    mask_RC = jnp.broadcast_to(live_R1, (call.tiles.rows, cols))
    if call.N % call.tiles.cols:  # then whole parts may lie beyond the last column
        mask_RC &= (col_C < call.N)[None, :]
    # what rows without a matrix hold must not reach the epilogue
    load = lambda ref: plgpu.load(ref.at[tile_at], mask=mask_RC & at.held, other=0)
    scale_R1 = None
    if r.scale is not None:
        scale_R1 = plgpu.load(r.scale.at[row_R], mask=(row_R < at.end) & at.held, other=0)[:, None]
    results = iter(call.epilogue(sums, [functools.partial(load, ref) for ref in r.rows], scale_R1))
    for ref in r.out:
        plgpu.store(ref.at[tile_at], next(results).astype(ref.dtype), mask=mask_RC)
    for ref in r.sums:
        plgpu.store(ref.at[jnp.broadcast_to(column, row_R.shape), row_R], next(results), mask=row_R < at.end)


def _iota(size: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (size,), 0)


def _sums(call: Call, r: _Refs, at: schedule.RowTile, row_R: Array, col_C: Array) -> list[Array]:
    """The sums of the products, zero where there is no matrix."""
    t = call.tiles
    held_R1 = None
    if r.index is not None:
        row_R = plgpu.load(r.index.at[row_R])
        held_R1, row_R = (row_R < r.lhs[0].shape[0])[:, None], jnp.minimum(row_R, r.lhs[0].shape[0] - 1)
    # beyond the last column: any column, whose result is not stored
    col_C = jnp.minimum(col_C, call.N - 1) if call.N % t.cols else col_C

    def step(phase: tuple[Product, ...], i: Array, sums: list[Array]) -> list[Array]:
        k_K = i * t.inner + _iota(t.inner)
        live_K = k_K < call.K if call.K % t.inner else None
        live_1K, live_K1 = (None, None) if live_K is None else (live_K[None, :], live_K[:, None])
        k_K = k_K if live_K is None else jnp.minimum(k_K, call.K - 1)
        lhs = {n: load_tile(r.lhs[n], (), row_R, k_K, held_R1, live_1K) for n in {p.left for p in phase}}
        for p in phase:
            left, where = lhs[p.left], (k_K, col_C, live_K1)
            if call.transpose_rhs:
                where = (col_C, k_K, live_1K)
            right = load_tile(r.rhs[p.right], (at.group,), *where).astype(left.dtype)
            if r.inner:
                left = (left * plgpu.load(r.inner[p.right].at[at.group, k_K])[None, :]).astype(left.dtype)
            sums[p.to] = sums[p.to] + dot(left, right, (1, 1 if call.transpose_rhs else 0))
        return sums

    count = 1 + max(p.to for phase in call.phases for p in phase)
    totals = [jnp.zeros((t.rows, t.cols), jnp.float32) for _ in range(count)]
    steps = at.held.astype(jnp.int32) * -(-call.K // t.inner)
    for phase in call.phases:
        begin = [jnp.zeros_like(total) for total in totals] if r.outer else totals
        sums = jax.lax.fori_loop(0, steps, functools.partial(step, phase), begin)
        if r.outer:
            # a scale of the columns meets the sum
            for p in phase:
                sums[p.to] = totals[p.to] + sums[p.to] * plgpu.load(r.outer[p.right].at[at.group, col_C])[None, :]
        totals = sums
    return totals


def store(sums: list[Array], loads: list[Callable[[], Array]], scale: Array | None) -> list[Array]:
    """The epilogue that does nothing."""
    return sums


def load_tile(ref: Ref, first: tuple[Array, ...], a_A: Array, b_B: Array, *masks: Array | None) -> Array:
    """ref[*first, a, b] of all pairs, (A, B); zero where a mask says no. The indices are clamped if there is one."""
    at = ref.at[(*first, a_A[:, None], b_B[None, :])]
    masks = [jnp.broadcast_to(m, (a_A.shape[0], b_B.shape[0])) for m in masks if m is not None]
    if not masks:
        return plgpu.load(at)
    return plgpu.load(at, mask=functools.reduce(jnp.logical_and, masks), other=0)


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Sums over a dim of a and one of b, in float32: exactly, too, if that is what they are."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32, precision=precision)
