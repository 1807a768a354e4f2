"""Weights in 8 bits: every op and implementation against float64 products with the dequantized weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import Quantized, expert_ffn, grouped_matmul, quantize, routed_ffn

NARROW = ["int8", "float8_e4m3fn", "float8_e5m2"]
TOLERANCE = {"float32": 1e-6, "bfloat16": 4e-3}
M, K, N, G = 40, 24, 32, 4
# Empty groups first, in the middle, last; all in one; one row; none; rows left over.
RAGGED = [(12, 7, 17, 0), (0, 2, 0, 31), (40, 0, 0, 0), (0, 1, 0, 0), (0, 0, 0, 0), (8, 8, 8, 8)]


def draw(seed, *shape):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def exact(weights):
    """values * scale in float64: no op of ours."""
    return np.asarray(weights.values, np.float64) * np.asarray(weights.scale, np.float64)


def slices(sizes, offset, count):
    ends = np.cumsum(sizes)
    return [slice(ends[g] - sizes[g], ends[g]) for g in range(offset, offset + count)]


def assert_close(got, expected, dtype):
    assert got.dtype == dtype and got.shape == expected.shape
    error = np.abs(np.asarray(got, np.float64) - expected).max(initial=0)
    assert error <= TOLERANCE[dtype] * max(np.abs(expected).max(initial=0), 1e-30), error


@pytest.mark.parametrize("dtype", NARROW)
def test_quantize(dtype):
    w = draw(0, 3, 64, 20).astype(np.float32)
    w[1, :, 4] = 0
    for axis in (1, 2):
        q = quantize(jnp.asarray(w), dtype, axis=axis)
        assert q.dtype == dtype and q.shape == w.shape and q.scale.dtype == jnp.float32
        assert q.scale.shape == ((3, 1, 20) if axis == 1 else (3, 64, 1))
        # half a step of int8; half a unit in the last of 3 or 2 bits, or of the smallest number
        step = {"int8": 0.5, "float8_e4m3fn": 2.0**-10, "float8_e5m2": 2.0**-17}[dtype]
        relative = {"int8": 0, "float8_e4m3fn": 2.0**-4, "float8_e5m2": 2.0**-3}[dtype]
        assert np.all(np.abs(exact(q) - w) <= (step * np.asarray(q.scale) + relative * np.abs(w)) * (1 + 1e-6))
        np.testing.assert_allclose(q.dequantized(), exact(q), rtol=1e-6)
    assert not np.any(exact(quantize(jnp.asarray(w), dtype))[1, :, 4])


@pytest.mark.parametrize("change", [{"dtype": jnp.int4}, {"dtype": jnp.bfloat16}, {"axis": 0}])
def test_quantize_says_what_it_takes(change):
    with pytest.raises(ValueError, match="int8, float8_e4m3fn, float8_e5m2|axis be 1 or 2"):
        quantize(jnp.zeros((2, 4, 4)), **change)


# --- grouped_matmul --------------------------------------------------------------------------------------------------


def weights(narrow, transpose_rhs, scalar=False, groups=G):
    w = draw(1, groups, *((N, K) if transpose_rhs else (K, N))).astype(np.float32)
    q = quantize(jnp.asarray(w), narrow, axis=2 if transpose_rhs else 1)
    return Quantized(q.values, q.scale[:, :1, :1]) if scalar else q


def value_and_dlhs(implementation, transpose_rhs, lhs, dout, rhs, sizes, offset=None):
    call = lambda lhs: grouped_matmul(
        lhs, rhs, sizes, transpose_rhs=transpose_rhs, group_offset=offset, implementation=implementation
    )
    out, pullback = jax.vjp(call, lhs)
    return out, *pullback(dout)


compiled = functools.cache(
    lambda implementation, transpose_rhs: jax.jit(functools.partial(value_and_dlhs, implementation, transpose_rhs))
)


def check_matmul(implementation, sizes, rhs, dtype, transpose_rhs=False, offset=None):
    """Values and the gradient of the rows. Rows of no group hold NaN and inf."""
    groups = slices(sizes, offset or 0, rhs.shape[0])
    live = np.zeros((M, 1), bool)
    live[groups[0].start : groups[-1].stop] = True
    lhs, dout = jnp.asarray(draw(2, M, K), dtype), jnp.asarray(draw(3, M, N), dtype)
    expected, dexpected = np.zeros((M, N)), np.zeros((M, K))
    for g, w in zip(groups, exact(rhs)):
        w = w.T if transpose_rhs else w
        expected[g], dexpected[g] = np.asarray(lhs, np.float64)[g] @ w, np.asarray(dout, np.float64)[g] @ w.T
    index = None if offset is None else jnp.int32(offset)
    out, dlhs = compiled(implementation, transpose_rhs)(
        jnp.where(live, lhs, np.nan), jnp.where(live, dout, np.inf), rhs, jnp.array(sizes), index
    )
    assert not np.any(out[~live[:, 0]]) and not np.any(dlhs[~live[:, 0]])
    assert_close(out, expected, dtype)
    # the gradient meets its scale before the product, and is rounded there
    assert_close(dlhs, dexpected, dtype)


ALL = ["xla", "xla_tiles", "pallas_tpu"]


@pytest.mark.parametrize("implementation", [*ALL, "reference"])
def test_matmul(implementation):
    for sizes in RAGGED:
        check_matmul(implementation, sizes, weights("int8", False), "float32")


@pytest.mark.parametrize(
    ("implementation", "narrow"), [("xla", "int8"), ("xla_tiles", "float8_e5m2"), ("pallas_gpu", "float8_e4m3fn")]
)
def test_matmul_transposed(implementation, narrow):
    check_matmul(implementation, RAGGED[0], weights(narrow, True), "bfloat16", True)


@pytest.mark.parametrize("implementation", ["xla", "xla_tiles"])
def test_matmul_of_some_groups(implementation):
    for offset in range(3):
        check_matmul(implementation, RAGGED[0], weights("int8", False, groups=2), "bfloat16", offset=offset)


def test_one_scale_per_group():
    check_matmul("xla_tiles", RAGGED[0], weights("float8_e4m3fn", False, scalar=True), "float32")


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 10), min_size=G, max_size=G), st.sampled_from(ALL))
def test_matmul_of_any_sizes(sizes, implementation):
    check_matmul(implementation, tuple(sizes), weights("int8", False), "float32")


@pytest.mark.parametrize("implementation", ["xla_tiles", "pallas_tpu"])
def test_shard_map_over_groups(implementation):
    """Values and scales sharded over groups by a per-device offset: the sum over devices is the whole."""
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,))
    rhs, sizes = weights("int8", False), (12, 7, 17, 0)

    def local(lhs, rhs, sizes):
        offset = jax.lax.axis_index("expert") * rhs.shape[0]
        out = grouped_matmul(lhs, rhs, sizes, group_offset=offset, implementation=implementation)
        return jax.lax.psum(out, "expert")

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("expert"), P()), out_specs=P())
    lhs, dout = jnp.asarray(draw(2, M, K), jnp.float32), jnp.asarray(draw(3, M, N), jnp.float32)
    out, pullback = jax.vjp(lambda lhs: jax.jit(sharded)(lhs, rhs, jnp.array(sizes)), lhs)
    expected = value_and_dlhs("reference", False, lhs, dout, rhs, jnp.array(sizes))
    assert_close(out, np.asarray(expected[0], np.float64), "float32")
    assert_close(*pullback(dout), np.asarray(expected[1], np.float64), "float32")


def test_no_gradient_of_the_weights():
    """Adapters train through frozen weights, also in a scan under checkpoint; the weights' own is an error."""
    x, rhs, sizes = jnp.asarray(draw(2, M, K), jnp.float32), weights("float8_e5m2", False), jnp.array(RAGGED[0])
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), rhs)

    def loss(adapter_NK, stacked):
        layer = jax.checkpoint(lambda x, w: (grouped_matmul(x, w, sizes) @ adapter_NK, None))
        return jnp.sum(jax.lax.scan(layer, x, stacked)[0])

    adapter = jnp.asarray(draw(4, N, K), jnp.float32) / 8
    assert np.any(jax.jit(jax.grad(loss))(adapter, stacked))
    with pytest.raises(TypeError, match="grouped_matmul: quantized weights are frozen.*stop_gradient"):
        jax.grad(loss, 1, allow_int=True)(adapter, stacked)
    loss_of_scale = lambda scale: jnp.sum(grouped_matmul(x, Quantized(rhs.values, scale), sizes))
    with pytest.raises(TypeError, match="quantized weights are frozen"):
        jax.grad(loss_of_scale)(rhs.scale)
    assert not np.any(jax.grad(lambda s: loss_of_scale(jax.lax.stop_gradient(s)))(rhs.scale))


@pytest.mark.parametrize(
    ("values", "scale", "error", "message"),
    [
        ((jnp.int16, (G, K, N)), (jnp.float32, (G, 1, N)), TypeError, "rhs must have values of int8, float8_e4m3fn"),
        ((jnp.int8, (G, K, N)), (jnp.bfloat16, (G, 1, N)), TypeError, "and a float32 scale. Given: lhs"),
        ((jnp.int8, (G, K, N)), (jnp.float32, (G, N)), ValueError, r"shape \[4, 1, 32\] or \[4, 24, 1\], one number"),
        ((jnp.int8, (G, K + 1, N)), (jnp.float32, (G, 1, N)), ValueError, r"int8\[4, 25, 32\] \* float32\[4, 1, 32\]"),
    ],
)
def test_errors_name_what_was_given(values, scale, error, message):
    rhs = Quantized(jnp.zeros(values[1], values[0]), jnp.zeros(scale[1], scale[0]))
    with pytest.raises(error, match=message):
        grouped_matmul(jnp.zeros((M, K)), rhs, jnp.zeros(G, jnp.int32))


# --- expert_ffn, routed_ffn ------------------------------------------------------------------------------------------


def ffn_weights(narrow, gated, D=K, F=N):
    dims = ((D, F), (D, F), (F, D))
    gate, up, down = (quantize(jnp.asarray(draw(i, G, *d) / 4, jnp.float32), narrow) for i, d in enumerate(dims))
    return (gate if gated else None), up, down


def wide(weights):
    return tuple(None if w is None else jnp.asarray(exact(w)) for w in weights)


def value_and_dx(implementation, activation, x, dy, weights, sizes):
    y, pullback = jax.vjp(
        lambda x: expert_ffn(x, *weights, sizes, activation=activation, implementation=implementation), x
    )
    return y, *pullback(dy)


ffn_compiled = functools.cache(
    lambda implementation, activation: jax.jit(functools.partial(value_and_dx, implementation, activation))
)


def check_ffn(implementation, sizes, dtype, weights, activation, tolerance):
    live = np.arange(M)[:, None] < sum(sizes)
    x, dy = jnp.asarray(draw(5, M, K), dtype), jnp.asarray(draw(6, M, K), dtype)
    with jax.enable_x64(True):
        rows = [jnp.asarray(np.asarray(a, np.float64) * live) for a in (x, dy)]
        expected = value_and_dx("reference", activation, *rows, wide(weights), jnp.array(sizes))
    got = ffn_compiled(implementation, activation)(
        jnp.where(live, x, np.nan), jnp.where(live, dy, np.inf), weights, jnp.array(sizes)
    )
    for a, b in zip(got, map(np.asarray, expected)):
        assert a.dtype == dtype and not np.any(a[~live[:, 0]])
        assert np.abs(np.asarray(a, np.float64) - b).max() <= tolerance * max(np.abs(b).max(), 1e-30)


@pytest.mark.parametrize("implementation", ["xla", "xla_tiles", "reference"])
def test_ffn(implementation):
    for sizes in RAGGED:
        check_ffn(implementation, sizes, "float32", ffn_weights("int8", True), "silu", 2e-6)


@pytest.mark.parametrize("implementation", ["xla", "xla_tiles"])
def test_only_the_way_down_quantized(implementation):
    """The others then train."""
    gate, up, down = ffn_weights("int8", True)
    x, sizes = jnp.asarray(draw(5, M, K), jnp.float32), jnp.array(RAGGED[0])

    def loss(x, gate, up, down, implementation):
        return jnp.sum(jnp.sin(expert_ffn(x, gate, up, down, sizes, implementation=implementation)))

    args = x, gate.dequantized(), up.dequantized()
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=4)
    for a, b in zip(gradients(*args, down, implementation), gradients(*args, down.dequantized(), "reference")):
        assert_close(a, np.asarray(b, np.float64), "float32")


@pytest.mark.parametrize("implementation", ["xla_tiles", "pallas_tpu"])
def test_routed_ffn(implementation):
    """Two experts per token, with gates; the gradients of tokens and gates. So wide that the kernels gather rows."""
    rng, T, D, F = np.random.default_rng(0), M // 2, 128, 32
    experts = rng.permuted(np.tile(np.arange(G), (T, 1)), axis=1)[:, :2].reshape(-1)
    choice = np.argsort(experts, kind="stable").astype(np.int32)
    plan = np.bincount(experts, minlength=G), choice, np.argsort(choice).reshape(T, 2)
    x, dout, gates = (a.astype(np.float32) for a in (draw(5, T, D), draw(6, T, D), rng.random((T, 2))))
    q = ffn_weights("int8", True, D, F)

    def loss(x, gates, weights, implementation):
        how = dict(activation="relu", implementation=implementation)
        # linear: the sine of large sums would make their rounding larger still
        return jnp.sum(dout * routed_ffn(x, *weights, *plan, gates, **how))

    gradients = jax.jit(jax.grad(loss, (0, 1)), static_argnums=3)
    with jax.enable_x64(True):
        expected = gradients(x.astype(np.float64), gates.astype(np.float64), wide(q), "reference")
    for a, b in zip(gradients(x, gates, q, implementation), map(np.asarray, expected)):
        assert a.dtype == jnp.float32 and np.abs(a - b).max() <= 2e-6 * np.abs(b).max()


def test_gate_and_up_alike():
    gate, up, down = ffn_weights("int8", True)
    with pytest.raises(TypeError, match=r"expert_ffn: w_gate and w_up must have one dtype. Given: x float32\[40, 24\]"):
        expert_ffn(jnp.zeros((M, K)), gate.dequantized(), up, down, jnp.zeros(G, jnp.int32))
