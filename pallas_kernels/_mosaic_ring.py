"""What the Pallas Mosaic kernels for compute capability 9.0 share: blocks, warpgroups, and a ring of operand tiles.

As many blocks as there are multiprocessors stay for the whole call. In each, one warpgroup copies operand tiles ahead
by TMA, through a ring of buffers that runs on across tiles, and two multiply them (wgmma), half of the rows each.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import _gpu_target

Ref = Any
#: Rows of a tile, of which each of the warpgroups that multiply has half; what is summed per step.
ROWS, HALF, INNER = 128, 64, 64
#: Columns of a tile that leave at a time.
CHUNK = 64
#: Copies of rows begin at multiples of this.
ALIGN = 8
WARPGROUPS = 2
_COMPUTE_REGISTERS, _COPY_REGISTERS = 232, 40
#: Interpreted: few blocks, each of which has several tiles.
_INTERPRETED_CORES = 2


def transforms(cols: int) -> tuple[Any, ...]:
    """How 16-bit numbers lie in shared memory that TMA copies and wgmma reads, `cols` or a multiple of 64 in a line."""
    cols = min(cols, 64)
    return plgpu.TilingTransform((8, cols)), plgpu.SwizzleTransform(2 * cols)


def columns(N: int, sums: int = 1) -> int:
    """Columns of a tile, of which registers hold `sums`."""
    return 256 // sums if N % (256 // sums) == 0 else 128


def stages(cols: int) -> int:
    """Buffers of the ring for `cols` columns of all matrices: what fits into 227 KiB beside those of the results."""
    return 4 if cols == 256 else 6


def num_cores(interpret: bool) -> int:
    """Blocks of a call."""
    target = _gpu_target.current()
    return _INTERPRETED_CORES if interpret or target is None else target.num_cores


def launch(num_cores: int, interpret: bool) -> dict[str, Any]:
    """One block per multiprocessor, of two warpgroups that multiply and one that copies."""
    return dict(
        grid=(num_cores,), grid_names=("core",), num_threads=WARPGROUPS + 1, thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        # TMA fills what lies beyond the last row
        interpret=plgpu.InterpretGPUParams(out_of_bounds_reads="uninitialized") if interpret else None,
    )  # fmt: skip


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

        @pl.when(warpgroup == WARPGROUPS)
        def _():
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
            n = jax.lax.fori_loop(0, count, copy, jnp.int32(0))
            # what was filled last must be empty before the barriers go
            wait = lambda j, _: plgpu.barrier_wait(self.empty.at[self.slot(j)])
            jax.lax.fori_loop(jnp.maximum(n - self.size, 0), n, wait, None)

        @pl.when(warpgroup < WARPGROUPS)
        def _():
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            jax.lax.fori_loop(0, count, multiply, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    def slot(self, n: Array) -> Array:
        """The buffer of a step."""
        return jax.lax.rem(n, jnp.int32(self.size))

    def fill(self, steps: Array, n: Array, copy: Callable[[Array, Array], None]) -> Array:
        """Calls `copy(k, slot)` for all steps, each when its slot is free."""

        def step(k: Array, n: Array) -> Array:
            @pl.when(n >= self.size)
            def _():
                plgpu.barrier_wait(self.empty.at[self.slot(n)])

            copy(k, self.slot(n))
            return n + 1

        return jax.lax.fori_loop(0, steps, step, n)

    def consume(
        self, shape: tuple[int, int], sums: int, steps: Array, n: Array, multiply: Callable[..., None]
    ) -> tuple[list[Array], Array]:
        """(what `multiply(accs, slot, k)`, one product for each, sums up over all steps, n).

        A slot is free once the next step's products have begun.
        """

        def scope(*accs: Ref) -> list[Array]:
            def step(k: Array, n: Array) -> Array:
                plgpu.barrier_wait(self.full.at[self.slot(n)])
                multiply(accs, self.slot(n), k)
                plgpu.wgmma_wait(sums)

                @pl.when(k > 0)
                def _():
                    plgpu.barrier_arrive(self.empty.at[self.slot(n - 1)])

                return n + 1

            after = jax.lax.fori_loop(0, steps, step, n)
            plgpu.wgmma_wait(0)

            @pl.when(steps > 0)
            def _():
                plgpu.barrier_arrive(self.empty.at[self.slot(after - 1)])

            return [acc[...] for acc in accs]

        return pl.run_scoped(scope, *[plgpu.ACC(shape, jnp.float32)] * sums), n + steps
