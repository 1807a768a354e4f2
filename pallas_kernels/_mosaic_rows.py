"""GPU kernel (Pallas, Mosaic) for compute capability 9.0 of rows times their group's matrices.

As many blocks as there are multiprocessors stay for the whole call. In each, one warpgroup copies operand tiles ahead
by TMA, through a ring of buffers that runs on across tiles, and two multiply them (wgmma), half of the rows each.

Copies of rows start at multiples of 8, so the first tile of a group begins up to 7 rows above it; rows of other groups
are multiplied along, and not stored. Whole halves of a tile leave by one copy per chunk of columns, others by copies of
64, 32, ... rows, of which each number of rows has its own. Which rows a tile has, a small table says (`row_table`).

Dims: M rows, K summed, N columns, G groups of the weights, L in the sizes, I tiles.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import _gpu_schedule

Ref = Any
#: Rows of a tile, of which each of the warpgroups that multiply has half; what is summed per step.
ROWS, HALF, INNER = 128, 64, 64
#: Copies of rows begin at multiples of this.
ALIGN = 8
_CHUNK = 64
_WARPGROUPS = 2
_COMPUTE_REGISTERS, _COPY_REGISTERS = 232, 40
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


@dataclasses.dataclass(frozen=True)
class Call:
    """What the kernel knows while it is compiled. cols: columns of a tile; width: see _gpu_schedule.swizzled."""

    M: int
    K: int
    N: int
    G: int
    L: int
    transpose_rhs: bool
    num_cores: int
    width: int = 8

    @property
    def cols(self) -> int:
        return columns(self.N)

    @property
    def num_tiles(self) -> int:
        return (self.M + (self.L + 1) * (ROWS + ALIGN - 2)) // ROWS


def columns(N: int) -> int:
    """Columns of a tile."""
    return 256 if N % 256 == 0 else 128


def stages(cols: int) -> int:
    """Buffers of the ring: what fits into 227 KiB beside those of the results."""
    return 4 if cols == 256 else 6


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


def matmul(call: Call, lhs_MK: Array, rhs: Array, sizes_L: Array, offset: Array | None, interpret: Any) -> Array:
    """out (M, N) in lhs's dtype, bfloat16."""
    cols, ring = call.cols, stages(call.cols)
    buffer = lambda *shape: plgpu.SMEM((ring, *shape), lhs_MK.dtype, transforms=TRANSFORMS)
    barrier = plgpu.Barrier(num_arrivals=2, num_barriers=ring)

    def mosaic_matmul_rows(*refs: Ref) -> None:
        _kernel(call, *refs)

    return plgpu.kernel(
        mosaic_matmul_rows,
        out_type=jax.ShapeDtypeStruct(
            (call.M, call.N), lhs_MK.dtype, manual_axis_type=jax.typeof(lhs_MK).manual_axis_type
        ),
        scratch_types=[
            buffer(ROWS, INNER),
            buffer(cols, INNER) if call.transpose_rhs else buffer(INNER, cols),
            plgpu.SMEM((_WARPGROUPS, HALF, _CHUNK), lhs_MK.dtype, transforms=TRANSFORMS),
            plgpu.SMEM((_WARPGROUPS, HALF, _CHUNK), lhs_MK.dtype),
            barrier,
            barrier,
        ],
        **launch(call.num_cores, interpret),
    )(*row_table(call, sizes_L, offset), lhs_MK, rhs)


def launch(num_cores: int, interpret: Any) -> dict[str, Any]:
    """One block per multiprocessor, of two warpgroups that multiply and one that copies."""
    return dict(
        grid=(num_cores,), grid_names=("core",), num_threads=_WARPGROUPS + 1, thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )  # fmt: skip


def _kernel(call: Call, group, row, first, end, lhs, rhs, out, x, w, whole, part, full, empty) -> None:
    """x, w: the ring of operand tiles; full and empty: its barriers. whole, part: results on their way out."""
    warpgroup = jax.lax.axis_index("warpgroup")
    count = call.N // call.cols
    ring = Ring(stages(call.cols), full, empty)

    def place(i: Array) -> tuple[Array, Array]:
        """(tile, first column) of this block's i-th."""
        tile, column = _gpu_schedule.swizzled(program(i, call.num_cores), call.num_tiles, count, call.width)
        return tile, pl.multiple_of(column * call.cols, call.cols)

    steps = lambda tile: jnp.where(group[tile] >= 0, call.K // INNER, 0)

    def copy(i: Array, n: Array) -> Array:
        tile, col = place(i)
        rows, cols = pl.ds(pl.multiple_of(row[tile], ALIGN), ROWS), pl.ds(col, call.cols)

        def step(k: Array, slot: Array) -> None:
            inner = pl.ds(pl.multiple_of(k * INNER, INNER), INNER)
            plgpu.copy_gmem_to_smem(lhs.at[rows, inner], x.at[slot], full.at[slot])
            matrix = (group[tile], cols, inner) if call.transpose_rhs else (group[tile], inner, cols)
            plgpu.copy_gmem_to_smem(rhs.at[matrix], w.at[slot], full.at[slot])

        return ring.fill(steps(tile), n, step)

    def multiply(i: Array, n: Array) -> Array:
        tile, col = place(i)

        def step(acc: Ref, slot: Array, k: Array) -> None:
            matrix = w.at[slot].transpose((1, 0)) if call.transpose_rhs else w.at[slot]
            mine = pl.ds(pl.multiple_of(warpgroup * HALF, HALF), HALF)
            plgpu.wgmma(acc, x.at[slot, mine], matrix)

        total, n = ring.consume((HALF, call.cols), steps(tile), n, step)
        top = row[tile] + warpgroup * HALF
        begin = jnp.maximum(first[tile], top)
        _store(
            total,
            whole.at[warpgroup],
            part.at[warpgroup],
            out,
            top,
            begin - top,
            jnp.minimum(end[tile], top + HALF) - begin,
            col,
        )
        return n

    ring.run(warpgroup, share(call.num_tiles * count, call.num_cores), copy, multiply)


def _store(total: Array, whole: Ref, part: Ref, out: Ref, top: Array, skip: Array, rows: Array, col: Array) -> None:
    """out[top + skip : top + skip + rows, col :] = total[skip : skip + rows], rows at most HALF or not positive."""
    chunks = range(0, total.shape[1], _CHUNK)

    @pl.when(rows == HALF)
    def _():
        for c in chunks:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            whole[...] = total[:, c : c + _CHUNK].astype(whole.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(whole, out.at[pl.ds(pl.multiple_of(top, ALIGN), HALF), pl.ds(col + c, _CHUNK)])

    @pl.when((rows > 0) & (rows < HALF))
    def _():
        for c in chunks:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            part[...] = total[:, c : c + _CHUNK].astype(part.dtype)
            plgpu.commit_smem()
            at, size = skip, HALF // 2
            while size:

                @pl.when((rows & size) != 0)
                def _(at=at, size=size, c=c):
                    to = out.at[pl.ds(top + at, size), pl.ds(col + c, _CHUNK)]
                    plgpu.copy_smem_to_gmem(part.at[pl.ds(at, size)], to)

                at, size = at + (rows & size), size // 2


# --- shared with the weights' gradient --------------------------------------------------------------------------------


def program(i: Array, num_cores: int) -> Array:
    """The number of this block's i-th tile."""
    return i * num_cores + jax.lax.axis_index("core")


def share(total: int, num_cores: int) -> Array:
    """How many of `total` tiles this block has."""
    return jax.lax.div(total - jax.lax.axis_index("core") + (num_cores - 1), jnp.int32(num_cores))


@dataclasses.dataclass(frozen=True)
class Ring:
    """Buffers that one warpgroup fills and two empty, in the same order; n counts the steps of all tiles so far."""

    size: int
    full: Ref
    empty: Ref

    def run(self, warpgroup: Array, count: Array, copy: Any, multiply: Any) -> None:
        """`n = copy(i, n)` and `n = multiply(i, n)` for the `count` tiles, each in its warpgroups."""

        @pl.when(warpgroup == _WARPGROUPS)
        def _():
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
            n = jax.lax.fori_loop(0, count, copy, jnp.int32(0))
            # what was filled last must be empty before the barriers go
            wait = lambda j, _: plgpu.barrier_wait(self.empty.at[self.slot(j)])
            jax.lax.fori_loop(jnp.maximum(n - self.size, 0), n, wait, None)

        @pl.when(warpgroup < _WARPGROUPS)
        def _():
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            jax.lax.fori_loop(0, count, multiply, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    def slot(self, n: Array) -> Array:
        return jax.lax.rem(n, jnp.int32(self.size))

    def fill(self, steps: Array, n: Array, copy: Any) -> Array:
        """Calls `copy(k, slot)` for all steps, each when its slot is free."""

        def step(k: Array, n: Array) -> Array:
            @pl.when(n >= self.size)
            def _():
                plgpu.barrier_wait(self.empty.at[self.slot(n)])

            copy(k, self.slot(n))
            return n + 1

        return jax.lax.fori_loop(0, steps, step, n)

    def consume(self, shape: tuple[int, int], steps: Array, n: Array, multiply: Any) -> tuple[Array, Array]:
        """(what `multiply(acc, slot, k)` sums up over all steps, n).

        A slot is free once the next step's product has begun.
        """

        def scope(acc: Ref) -> Array:
            def step(k: Array, n: Array) -> Array:
                plgpu.barrier_wait(self.full.at[self.slot(n)])
                multiply(acc, self.slot(n), k)
                plgpu.wgmma_wait(1)

                @pl.when(k > 0)
                def _():
                    plgpu.barrier_arrive(self.empty.at[self.slot(n - 1)])

                return n + 1

            after = jax.lax.fori_loop(0, steps, step, n)
            plgpu.wgmma_wait(0)

            @pl.when(steps > 0)
            def _():
                plgpu.barrier_arrive(self.empty.at[self.slot(after - 1)])

            return acc[...]

        return pl.run_scoped(scope, plgpu.ACC(shape, jnp.float32)), n + steps
