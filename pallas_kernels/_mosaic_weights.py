"""GPU kernel (Pallas, Mosaic) for compute capability 9.0 of the weights' gradient: left.T @ right over a group's rows.

Blocks, warpgroups and the ring: _mosaic_ring. A tile of one group's matrix sums over all of the group's rows, the
two warpgroups half of its rows each. Copies start at multiples of 8 rows: what lies above the group in the first step
and below it in the last is zeroed in shared memory, half of it by each warpgroup; all other steps are taken as they
come.

Dims: M rows, G groups, A and B of a matrix.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import _gpu_schedule, _groups, _mosaic_ring, _varying
from pallas_kernels._mosaic_ring import ALIGN, CHUNK, HALF, INNER, ROWS, Ref


@dataclasses.dataclass(frozen=True)
class Call:
    """What the kernel knows while it is compiled. width: see _gpu_schedule.swizzled."""

    M: int
    A: int
    B: int
    G: int
    num_cores: int
    width: int = 8

    @property
    def cols(self) -> int:
        return _mosaic_ring.columns(self.B)


def weight_gradient(
    call: Call, left_MA: Array, right_MB: Array, sizes_L: Array, offset: Array | None, *, interpret: bool = False
) -> Array:
    """(G, A, B) in left's dtype, bfloat16."""
    ring, dtype = _mosaic_ring.stages(call.cols), left_MA.dtype
    shared = lambda *shape: plgpu.SMEM(shape, dtype, transforms=_mosaic_ring.transforms(shape[-1]))
    barrier = plgpu.Barrier(num_arrivals=2, num_barriers=ring)

    def mosaic_weight_gradient(*refs: Ref) -> None:
        _kernel(call, *refs)

    out = plgpu.kernel(
        mosaic_weight_gradient,
        out_type=jax.ShapeDtypeStruct((call.G, call.A, call.B), dtype),
        scratch_types=[
            shared(ring, INNER, ROWS),
            shared(ring, INNER, call.cols),
            shared(2, HALF, CHUNK),
            barrier,
            barrier,
            plgpu.Barrier(num_arrivals=2),
        ],
        **_mosaic_ring.launch(call.num_cores, interpret),
    )(*_groups.group_bounds(sizes_L, offset, call.G, call.M), left_MA, right_MB)
    return _varying.varying_like(out, left_MA)


def _kernel(call: Call, first, end, left, right, out, x, y, whole, full, empty, both) -> None:
    """x, y: the ring of operand tiles. `both`: a barrier of the two warpgroups that multiply."""
    warpgroup = jax.lax.axis_index("warpgroup")
    across, along = call.A // ROWS, call.B // call.cols
    ring = _mosaic_ring.Ring(_mosaic_ring.stages(call.cols), full, empty)

    def place(i: Array) -> tuple[Array, Array, Array]:
        """(group, first row, first column) of this block's i-th tile."""
        at = _mosaic_ring.program(i, call.num_cores)
        g = jax.lax.div(at, jnp.int32(across * along))
        a, b = _gpu_schedule.swizzled(at - g * (across * along), across, along, call.width)
        return g, pl.multiple_of(a * ROWS, ROWS), pl.multiple_of(b * call.cols, call.cols)

    top = lambda g: jax.lax.div(first[g], jnp.int32(ALIGN)) * ALIGN
    steps = lambda g: jnp.where(end[g] > first[g], jax.lax.div(end[g] - top(g) + (INNER - 1), jnp.int32(INNER)), 0)

    def copy(i: Array, n: Array) -> Array:
        g, a, b = place(i)

        def step(k: Array, slot: Array) -> None:
            at = pl.ds(pl.multiple_of(top(g) + k * INNER, ALIGN), INNER)
            plgpu.copy_gmem_to_smem(left.at[at, pl.ds(a, ROWS)], x.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(right.at[at, pl.ds(b, call.cols)], y.at[slot], full.at[slot])

        return ring.fill(steps(g), n, step)

    def multiply(i: Array, n: Array) -> Array:
        g, a, b = place(i)
        mine = pl.ds(pl.multiple_of(warpgroup * HALF, HALF), HALF)
        share = pl.ds(pl.multiple_of(warpgroup * (call.cols // 2), call.cols // 2), call.cols // 2)

        def step(accs: Sequence[Ref], slot: Array, k: Array) -> None:
            at = top(g) + k * INNER

            @pl.when((at < first[g]) | (at + INNER > end[g]))
            def _():
                for tile in (x.at[slot, :, mine], y.at[slot, :, share]):
                    _zero_others(tile, first[g] - at, end[g] - at)
                plgpu.commit_smem()
                plgpu.barrier_arrive(both)
                plgpu.barrier_wait(both)

            plgpu.wgmma(accs[0], x.at[slot, :, mine].transpose((1, 0)), y.at[slot])

        (total,), n = ring.consume((HALF, call.cols), 1, steps(g), n, step)
        for c in range(0, call.cols, CHUNK):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            whole[warpgroup] = total[:, c : c + CHUNK].astype(whole.dtype)
            plgpu.commit_smem()
            to = pl.ds(pl.multiple_of(a + warpgroup * HALF, HALF), HALF), pl.ds(pl.multiple_of(b + c, CHUNK), CHUNK)
            plgpu.copy_smem_to_gmem(whole.at[warpgroup], out.at[(g, *to)])
        return n

    ring.run(warpgroup, _mosaic_ring.share(call.G * across * along, call.num_cores), copy, multiply)


def _zero_others(tile: Ref, first: Array, end: Array) -> None:
    """Keeps rows [first, end)."""
    values = tile[...]
    row = plgpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, values.shape, 0), plgpu.Layout.WGMMA)
    tile[...] = jnp.where((row >= first) & (row < end), values, jnp.zeros_like(values))
