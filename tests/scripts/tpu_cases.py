"""Small Pallas kernels for test_tpu_sim.py, compiled in a process of their own."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

ROWS, COLUMNS, BLOCK = 2048, 512, 256


def copy():
    """Every block once in and out."""

    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] + 1

    spec = pl.BlockSpec((BLOCK, COLUMNS), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)
    call = pl.pallas_call(kernel, out_shape=shape, grid=(ROWS // BLOCK,), in_specs=[spec], out_specs=spec)
    return call, (shape,), {"min_bytes": 2 * 4 * ROWS * COLUMNS}


def multiply_as_often_as_told():
    """A loop whose trip count is an operand: two values for one compilation."""

    def kernel(count_ref, x_ref, out_ref):
        def add(i, total):
            return total + jnp.dot(x_ref[...], x_ref[...], preferred_element_type=jnp.float32)

        out_ref[...] = jax.lax.fori_loop(0, count_ref[0], add, jnp.zeros_like(out_ref))

    whole = pl.BlockSpec((BLOCK, BLOCK), lambda i, count: (0, 0))
    grid = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(1,), in_specs=[whole], out_specs=whole)
    call = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((BLOCK, BLOCK), jnp.float32), grid_spec=grid)
    args = (jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((BLOCK, BLOCK), jnp.bfloat16))
    times = lambda n: {"concrete": {0: np.array([n], np.int32)}, "useful_flops": 2 * n * BLOCK**3}
    return call, args, {"variants": {"three": times(3), "seven": times(7)}}


def broken():
    """What cannot be compiled is reported, not raised."""
    raise NotImplementedError("no such kernel")
