"""GPU kernel (Pallas, Mosaic) for compute capability 9.0 of rows times their group's matrices.

Blocks, warpgroups and the ring of operand tiles: _mosaic_ring. Copies of rows start at multiples of 8, so the first
tile of a group begins up to 7 rows above it; rows of other groups are multiplied along, and not stored. Whole halves of
a tile leave by one copy per chunk of columns, others by copies of 64, 32, ... rows, of which each number of rows has
its own. Which rows a tile has, a small table says (`row_table`).

As in _gpu_rows, which has the epilogues' interface: several products may be summed, or kept side by side, and an
epilogue turns the sums into what is stored. What it reads besides comes through the ring, behind the tile's operands.

Dims: M rows, K summed, N columns, G groups of the weights, L in the sizes, I tiles.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import _gpu_rows, _gpu_schedule, _mosaic_ring, _varying
from pallas_kernels._mosaic_ring import ALIGN, HALF, INNER, ROWS, WARPGROUPS, Ref


@dataclasses.dataclass(frozen=True)
class Call:
    """What the kernel knows while it is compiled.

    walks: row operands, each with matrices of its own: the products add up, one walk over K after the other.
    sums: products of the same rows that are kept side by side; walks * sums matrices in all.
    sides: at most two arrays (M, N) that the epilogue reads; with transpose_rhs and one sum only.
    width: see _gpu_schedule.swizzled.
    """

    M: int
    K: int
    N: int
    G: int
    L: int
    transpose_rhs: bool
    num_cores: int
    walks: int = 1
    sums: int = 1
    sides: int = 0
    outs: int = 1
    epilogue: _gpu_rows.Epilogue = _gpu_rows.store
    width: int = 8

    @property
    def cols(self) -> int:
        return _mosaic_ring.columns(self.N, self.sums)

    @property
    def chunk(self) -> int:
        """Columns that leave at a time: of what is made of sides, too, registers don't hold the terms of more."""
        return INNER // 2 if self.sides else INNER

    @property
    def stages(self) -> int:
        return _mosaic_ring.stages(self.cols * self.sums)

    @property
    def num_tiles(self) -> int:
        return (self.M + (self.L + 1) * (ROWS + ALIGN - 2)) // ROWS


def row_table(call: Call, sizes_L: Array, offset: Array | None) -> tuple[Array, Array, Array, Array]:
    """(group, row, first, end) of each tile: it holds rows from `row` on, of which those in [first, end) are its own.

    group -1: no matrix, the result is zero.
    """
    M, L = call.M, call.L
    sum_L = jnp.cumsum(sizes_L.astype(jnp.int32), dtype=jnp.int32)
    start = jnp.minimum(jnp.concatenate([jnp.zeros_like(sum_L[:1]), sum_L]), M)
    end = jnp.append(start[1:], jnp.int32(M))  # the rest is one more group
    row = start // ALIGN * ALIGN
    count = jnp.where(end > start, -(-(end - row) // ROWS), 0)
    last = jnp.cumsum(count, dtype=jnp.int32)
    tile_I = jnp.arange(call.num_tiles, dtype=jnp.int32)
    live_I = tile_I < last[-1]
    group_I = jnp.minimum(jnp.sum(last[None, :] <= tile_I[:, None], axis=1, dtype=jnp.int32), L)
    row_I = row[group_I] + (tile_I - (last - count)[group_I]) * ROWS
    first_I = jnp.maximum(start[group_I], row_I)
    held_I = group_I - (0 if offset is None else offset)
    held_I = jnp.where((held_I >= 0) & (held_I < call.G) & (group_I < L) & live_I, held_I, -1)
    return (held_I, *(jnp.where(live_I, a, 0) for a in (row_I, first_I, end[group_I])))


def matmul_rows(
    call: Call,
    lhs: Sequence[Array],
    rhs: Sequence[Array],
    sizes_L: Array,
    offset: Array | None,
    *,
    sides: Sequence[Array] = (),
    interpret: bool = False,
) -> list[Array]:
    """`call.outs` arrays (M, N) in lhs's dtype, bfloat16. Matrices in the order of walks, those of a walk together."""
    dtype = lhs[0].dtype
    shared = lambda *shape: plgpu.SMEM(shape, dtype, transforms=_mosaic_ring.transforms(shape[-1]))
    matrix = (call.cols, INNER) if call.transpose_rhs else (INNER, call.cols)
    counts = (4, len(lhs), len(rhs), len(sides), call.outs)

    def mosaic_matmul_rows(*refs: Ref, **buffers: Ref) -> None:
        table, *arrays = jax.tree.unflatten(jax.tree.structure([[0] * n for n in counts]), refs)
        _kernel(call, _Table(*table), *arrays, **buffers)

    outs = plgpu.kernel(
        mosaic_matmul_rows,
        out_type=[jax.ShapeDtypeStruct((call.M, call.N), dtype)] * call.outs,
        scratch_types=dict(
            x=shared(call.stages, ROWS, INNER),
            w=[shared(call.stages, *matrix) for _ in range(call.sums)],
            whole=shared(WARPGROUPS, HALF, call.chunk),
            part=plgpu.SMEM((WARPGROUPS, HALF, call.chunk), dtype),
            full=plgpu.Barrier(num_arrivals=1 + call.sums, num_barriers=call.stages),
            empty=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=call.stages),
        ),
        **_mosaic_ring.launch(call.num_cores, interpret),
    )(*row_table(call, sizes_L, offset), *lhs, *rhs, *sides)
    return _varying.varying_like(outs, lhs[0])


class _Table(NamedTuple):
    """That of `row_table`."""

    group: Ref
    row: Ref
    first: Ref
    end: Ref


def _kernel(
    call: Call, table: _Table, lhs: list[Ref], rhs: list[Ref], sides: list[Ref], outs: list[Ref],
    *, x: Ref, w: list[Ref], whole: Ref, part: Ref, full: Ref, empty: Ref,
) -> None:  # fmt: skip
    """x, w: the ring of operand tiles; full and empty: its barriers. whole, part: results on their way out."""
    warpgroup = jax.lax.axis_index("warpgroup")
    count = call.N // call.cols
    ring = _mosaic_ring.Ring(call.stages, full, empty)
    mine = pl.ds(pl.multiple_of(warpgroup * HALF, HALF), HALF)

    def place(i: Array) -> tuple[Array, Array]:
        """(tile, first column) of this block's i-th."""
        at = _mosaic_ring.program(i, call.num_cores)
        tile, column = _gpu_schedule.swizzled(at, call.num_tiles, count, call.width)
        return tile, pl.multiple_of(column * call.cols, call.cols)

    steps = lambda tile: jnp.where(table.group[tile] >= 0, call.K // INNER, 0)
    live = lambda tile: table.end[tile] > table.first[tile]

    def copy(i: Array, n: Array) -> Array:
        tile, col = place(i)
        group, rows = table.group[tile], pl.ds(pl.multiple_of(table.row[tile], ALIGN), ROWS)
        cols = pl.ds(col, call.cols)

        def operands(walk: int, k: Array, slot: Array) -> None:
            inner = pl.ds(pl.multiple_of(k * INNER, INNER), INNER)
            plgpu.copy_gmem_to_smem(lhs[walk].at[rows, inner], x.at[slot], full.at[slot])
            for j in range(call.sums):
                at = (group, cols, inner) if call.transpose_rhs else (group, inner, cols)
                plgpu.copy_gmem_to_smem(rhs[walk * call.sums + j].at[at], w[j].at[slot], full.at[slot])

        def sides_of(c: Array, slot: Array) -> None:
            """One goes where rows go, the other where the matrix goes."""
            at = rows, pl.ds(pl.multiple_of(col + c * INNER, INNER), INNER)
            for side, buffer in zip(sides, (x.at[slot], w[0].at[slot, pl.ds(0, ROWS)])):
                plgpu.copy_gmem_to_smem(side.at[at], buffer, full.at[slot])
            if len(sides) == 1:  # the barrier counts two
                plgpu.barrier_arrive(full.at[slot])

        for walk in range(call.walks):
            n = ring.fill(steps(tile), n, functools.partial(operands, walk))
        if sides:
            n = ring.fill(jnp.where(live(tile), call.cols // INNER, 0), n, sides_of)
        return n

    def multiply(i: Array, n: Array) -> Array:
        tile, col = place(i)

        def step(accs: Sequence[Ref], slot: Array, k: Array) -> None:
            for acc, buffer in zip(accs, w):
                matrix = buffer.at[slot].transpose((1, 0)) if call.transpose_rhs else buffer.at[slot]
                plgpu.wgmma(acc, x.at[slot, mine], matrix)

        totals, n = ring.consume((HALF, call.cols), call.sums, call.walks * steps(tile), n, step)

        @pl.when(live(tile))
        def _():
            top = table.row[tile] + warpgroup * HALF
            begin = jnp.maximum(table.first[tile], top)
            span = (top, begin - top, jnp.minimum(table.end[tile], top + HALF) - begin)
            for c in range(0, call.cols, call.chunk):
                slot, within = ring.slot(n + c // INNER), c % INNER
                if sides and within == 0:
                    plgpu.barrier_wait(full.at[slot])
                loads = [functools.partial(_load, ref, slot, mine, within, call.chunk) for ref in (x, w[0])]
                sums = [total[:, c : c + call.chunk] for total in totals]
                results = call.epilogue(sums, loads[: len(sides)], None)
                # rounded before the first is stored: they take half of the registers of what they come from
                for out, result in zip(outs, [a.astype(x.dtype) for a in results], strict=True):
                    _store(result, whole.at[warpgroup], part.at[warpgroup], out, *span, col + c)
                if sides and within + call.chunk == INNER:
                    plgpu.barrier_arrive(empty.at[slot])

        return n + jnp.where(live(tile), call.cols // INNER, 0) if sides else n

    ring.run(warpgroup, _mosaic_ring.share(call.num_tiles * count, call.num_cores), copy, multiply)


def _load(ref: Ref, slot: Array, rows: Any, col: int, count: int) -> Array:
    return ref.at[slot, rows][...][:, col : col + count]


def _store(tile: Array, whole: Ref, part: Ref, out: Ref, top: Array, skip: Array, rows: Array, col: Array) -> None:
    """out[top + skip : top + skip + rows, col :] = tile[skip : skip + rows], rows at most HALF or not positive."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(rows == HALF)
    def _():
        whole[...] = tile
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(whole, out.at[pl.ds(pl.multiple_of(top, ALIGN), HALF), pl.ds(col, tile.shape[1])])

    @pl.when((rows > 0) & (rows < HALF))
    def _():
        part[...] = tile
        plgpu.commit_smem()
        at, size = skip, HALF // 2
        while size:

            @pl.when((rows & size) != 0)
            def _(at=at, size=size):
                plgpu.copy_smem_to_gmem(
                    part.at[pl.ds(at, size)], out.at[pl.ds(top + at, size), pl.ds(col, tile.shape[1])]
                )

            at, size = at + (rows & size), size // 2
