"""The Mosaic kernels for GPUs of compute capability 9.0: which rows a tile takes, and interpreted, their numerics.

That they compile: `make kernels-gpu`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import Quantized, _mosaic_ring, _mosaic_rows, expert_ffn, grouped_matmul

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="interpreting Mosaic kernels needs jax 0.12"
)


@pytest.mark.parametrize(("offset", "held", "sizes"), [(0, 4, (9, 0, 130, 53)), (1, 2, (3, 200, 1, 0))])
def test_every_row_has_one_tile_of_the_mosaic_kernel(offset, held, sizes):
    """Whose tiles begin at multiples of 8 rows."""
    M = 216
    call = _mosaic_rows.Call(M, 128, 128, held, len(sizes), False, 2)
    owner, seen = np.repeat([*range(-offset, len(sizes) - offset), -1], [*sizes, M - sum(sizes)]), np.zeros(M, int)
    owner[(owner < 0) | (owner >= held)] = -1
    table = jax.jit(functools.partial(_mosaic_rows.row_table, call))(jnp.array(sizes), jnp.int32(offset))
    for group, row, first, end in np.stack(table, axis=1):
        mine = slice(max(first, row), min(row + _mosaic_ring.ROWS, end))
        seen[mine] += 1
        assert row % 8 == 0 and np.all(owner[mine] == group)
    assert np.all(seen == 1)


def assert_close(got, expected, tolerance):
    """Finite bfloat16 numbers, and to the tolerance those of float32."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.bfloat16 and np.isfinite(np.asarray(a, np.float32)).all()
        assert np.abs(np.asarray(a, np.float32) - b).max() < tolerance * np.abs(b).max()


def value_and_gradients(function, dout, *args):
    out, pullback = jax.vjp(function, *args)
    return out, *pullback(dout)


@pytest.mark.slow  # every copy and barrier of three kernels is a callback
@interpreted
def test_grouped_matmul_equals_reference():
    """Forward and both gradients, of two of the groups; the rows of the others hold NaN."""
    sizes, (M, K, N) = (9, 100, 27, 0), (136, 128, 128)
    rng = np.random.default_rng(0)
    lhs, dout, rhs = (rng.normal(size=s) for s in ((M, K), (M, N), (2, K, N)))
    lhs[: sizes[0]], dout[sum(sizes[:3]) :] = np.nan, np.inf
    narrow = [jnp.asarray(a, jnp.bfloat16) for a in (dout, lhs, rhs)]

    def run(implementation, *args):
        how = dict(group_offset=jnp.int32(1), implementation=implementation)
        return value_and_gradients(lambda lhs, rhs: grouped_matmul(lhs, rhs, jnp.array(sizes), **how), *args)

    expected = run("reference", *(a.astype(jnp.float32) for a in narrow))
    assert_close(jax.jit(functools.partial(run, "mosaic_gpu"))(*narrow), expected, 4e-3)


@pytest.mark.slow  # every copy and barrier of up to seven kernels is a callback
@interpreted
@pytest.mark.parametrize(
    ("sizes", "held", "offset", "dims", "gated", "activation"),
    [
        ((9, 100, 27, 0), 2, 1, (136, 128, 128), True, "silu"),
        ((0, 130, 0, 13, 30), 5, 0, (200, 128, 256), True, "relu2"),
        ((3, 0, 101), 3, 0, (128, 256, 128), False, "gelu"),
    ],
)
def test_expert_ffn_equals_reference(sizes, held, offset, dims, gated, activation):
    """Forward and all gradients; the rows of experts that are not held, and those beyond the last, hold NaN."""
    (R, D, F), ends, rng = dims, np.cumsum(sizes), np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape) / np.sqrt(shape[-2] if len(shape) == 3 else 1)
    dy, x, weights = draw(R, D), draw(R, D), [draw(held, D, F), draw(held, D, F), draw(held, F, D)]
    for a, bad in ((dy, np.inf), (x, np.nan)):
        a[: ends[offset] - sizes[offset]], a[ends[offset + held - 1] :] = bad, bad
    given = (dy, x, weights[0] if gated else None, *weights[1:])
    narrow = [None if a is None else jnp.asarray(a, jnp.bfloat16) for a in given]

    def run(implementation, *args):
        how = dict(group_offset=jnp.int32(offset), activation=activation, implementation=implementation)
        return value_and_gradients(lambda *operands: expert_ffn(*operands, jnp.array(sizes), **how), *args)

    expected = run("reference", *(None if a is None else a.astype(jnp.float32) for a in narrow))
    got = jax.jit(functools.partial(run, "mosaic_gpu"))(*narrow)
    assert_close(got, expected, 8e-3)
    dead = ~np.isfinite(x[:, 0])
    assert not np.any(got[0][dead]) and not np.any(got[1][dead])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "takes and gives bfloat16, not float32"),
        ({"rows": 132}, "a multiple of 8, and K and N that are multiples of 128, not 132, 128 and 256"),
        ({"hidden": 192}, "multiples of 128, not 136, 128 and 192"),
        ({"down": jnp.int8}, "takes and gives bfloat16, not bfloat16, int8"),
    ],
)
def test_expert_ffn_says_why_not(change, reason):
    given = {"dtype": jnp.bfloat16, "rows": 136, "hidden": 256, "down": None} | change
    like = lambda *shape, dtype=given["dtype"]: jax.ShapeDtypeStruct(shape, dtype)
    up, down = like(4, 128, given["hidden"]), like(4, given["hidden"], 128, dtype=given["down"] or given["dtype"])
    if given["down"]:
        down = Quantized(down, like(4, 1, 128, dtype=jnp.float32))
    call = functools.partial(expert_ffn, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(call, like(given["rows"], 128), up, up, down, like(4, dtype=jnp.int32))
