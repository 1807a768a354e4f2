"""grouped_matmul: every implementation against the reference, in values and gradients."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import _choose, grouped_matmul

M, K, N, G = 300, 12, 20, 4
# Multiples of no tile; an empty group first, in the middle, last; all in one; one row; no rows at all; rows left over.
RAGGED = [
    (100, 61, 139, 0),
    (0, 17, 0, 250),
    (300, 0, 0, 0),
    (0, 0, 300, 0),
    (0, 1, 0, 0),
    (0, 0, 0, 0),
    (128, 128, 16, 16),
    (75, 75, 75, 75),
]
# The same in few rows, which compile faster: for what doesn't depend on the number of tiles.
SMALL, SMALL_ROWS = [tuple(s // 8 for s in sizes) for sizes in RAGGED], 40


def draw(seed, *shape, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def inputs(sizes, transpose_rhs=False, dtype=np.float32, groups=G, rows=M):
    """lhs with NaN in the rows beyond the last group, rhs, and an output gradient with inf there."""
    lhs, dout = draw(0, rows, K, dtype=dtype), draw(1, rows, N, dtype=dtype)
    lhs[sum(sizes) :], dout[sum(sizes) :] = np.nan, np.inf
    rhs = draw(2, groups, N, K, dtype=dtype) if transpose_rhs else draw(2, groups, K, N, dtype=dtype)
    return lhs, rhs, dout


def value_and_gradients(lhs, rhs, dout, sizes, offset=None, **how):
    out, pullback = jax.vjp(lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes, group_offset=offset, **how), lhs, rhs)
    return out, *pullback(dout)


@functools.cache
def compiled(implementation, **how):
    return jax.jit(functools.partial(value_and_gradients, implementation=implementation, **how))


def assert_close(got, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = a.astype(np.float64), b.astype(np.float64)
        scale = max(1.0, np.abs(b).max(initial=0.0))
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, rtol=0)


@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize("implementation", ["xla", "xla_tiles", "pallas_gpu"])
def test_equals_reference(implementation, transpose_rhs):
    got, expected = (compiled(name, transpose_rhs=transpose_rhs) for name in (implementation, "reference"))
    for sizes in RAGGED:
        args = (*inputs(sizes, transpose_rhs), jnp.array(sizes))
        result = got(*args)
        assert_close(result, expected(*args))
        assert not np.any(result[0][sum(sizes) :]) and not np.any(result[1][sum(sizes) :])


def test_reference_equals_a_loop():
    sizes = RAGGED[0]
    lhs, rhs, _ = inputs(sizes)
    ends = np.cumsum(sizes)
    rows = [lhs[end - size : end] @ rhs[g] for g, (size, end) in enumerate(zip(sizes, ends))]
    assert_close(grouped_matmul(lhs, rhs, jnp.array(sizes), implementation="reference"), np.concatenate(rows))


@pytest.mark.parametrize("implementation", ["reference", "xla", "xla_tiles", "pallas_gpu"])
def test_group_offset(implementation):
    """Two of the four groups at a time, with a traced offset: the other groups' rows are 0, whatever they hold."""
    held = 2
    run = compiled(implementation)
    for sizes in SMALL:
        lhs, rhs, dout = inputs(sizes, rows=SMALL_ROWS)
        ends = np.cumsum(sizes)
        for offset in range(G - held + 1):
            out, dlhs, drhs = run(lhs, rhs[offset : offset + held], dout, jnp.array(sizes), jnp.int32(offset))
            first, last = ends[offset] - sizes[offset], ends[offset + held - 1]
            inside = np.zeros((SMALL_ROWS, 1), bool)
            inside[first:last] = True
            expected = compiled("reference")(np.where(inside, lhs, 0), rhs, np.where(inside, dout, 0), jnp.array(sizes))
            assert_close((out, dlhs, drhs), (expected[0], expected[1], expected[2][offset : offset + held]))


@pytest.mark.parametrize("implementation", ["xla", "xla_tiles", "pallas_gpu"])
def test_bfloat16_accumulates_in_float32(implementation):
    sizes = SMALL[0]
    args = tuple(a.astype(jnp.bfloat16) for a in inputs(sizes, rows=SMALL_ROWS))
    wide = tuple(a.astype(jnp.float32) for a in args)
    got = compiled(implementation)(*args, jnp.array(sizes))
    expected = compiled("reference")(*wide, jnp.array(sizes))
    assert all(a.dtype == jnp.bfloat16 for a in got)
    assert_close([a.astype(jnp.float32) for a in got], expected, tolerance=2**-8)
    out = grouped_matmul(*args[:2], jnp.array(sizes), preferred_element_type=jnp.float32, implementation=implementation)
    assert out.dtype == jnp.float32
    assert_close(out, expected[0])


@pytest.mark.parametrize("implementation", ["xla", "xla_tiles"])
def test_float64(implementation):
    with jax.enable_x64(True):
        sizes = jnp.array(SMALL[1])
        args = inputs(SMALL[1], rows=SMALL_ROWS, dtype=np.float64)
        got = compiled(implementation)(*args, sizes)
        assert got[0].dtype == jnp.float64
        assert_close(got, compiled("reference")(*args, sizes), tolerance=1e-13)


def test_no_rows():
    out = grouped_matmul(jnp.zeros((0, K)), jnp.zeros((G, K, N)), jnp.zeros(G, jnp.int32))
    assert out.shape == (0, N)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_rows(check_vma):
    """Rows and sizes sharded, weights replicated: the weights' gradient is the sum over devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sizes_DG = jnp.array(SMALL)
    lhs, rhs, dout = (np.stack(a) for a in zip(*(inputs(s, rows=SMALL_ROWS) for s in SMALL)))

    def local(lhs, rhs, sizes):
        return grouped_matmul(lhs[0], rhs, sizes[0])[None]

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P("data"), check_vma=check_vma
    )
    out, pullback = jax.vjp(lambda lhs, rhs: jax.jit(sharded)(lhs, rhs, sizes_DG), lhs, rhs[0])
    dlhs, drhs = pullback(jnp.asarray(dout))
    parts = [compiled("reference")(lhs[d], rhs[0], dout[d], sizes_DG[d]) for d in range(8)]
    assert_close((out, dlhs), tuple(np.stack([p[i] for p in parts]) for i in range(2)))
    assert_close(drhs, sum(p[2] for p in parts))


@pytest.mark.parametrize("implementation", ["xla", "xla_tiles", "pallas_gpu"])
def test_shard_map_over_groups(implementation):
    """Groups sharded by a per-device offset, rows replicated: the sum over devices is the whole."""
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))
    sizes = (2, 0, 3, 1, 0, 0, 4, 5, 5, 0, 1, 0, 7, 0, 9, 1)
    lhs, rhs, dout = inputs(sizes, groups=16, rows=SMALL_ROWS)

    def local(lhs, rhs, sizes):
        offset = jax.lax.axis_index("expert") * rhs.shape[0]
        return jax.lax.psum(
            grouped_matmul(lhs, rhs, sizes, group_offset=offset, implementation=implementation), "expert"
        )

    # what varies cannot be checked in an interpreted kernel (it can in a compiled one, see below)
    specs = dict(in_specs=(P(), P("expert"), P()), out_specs=P(), check_vma=implementation != "pallas_gpu")
    sharded = jax.shard_map(local, mesh=mesh, **specs)
    out, pullback = jax.vjp(lambda lhs, rhs: jax.jit(sharded)(lhs, rhs, jnp.array(sizes)), lhs, rhs)
    expected = compiled("reference")(lhs, rhs, dout, jnp.array(sizes))
    assert_close((out, *pullback(jnp.asarray(dout))), expected)


def test_scan_and_checkpoint():
    sizes = jnp.array(SMALL[0])
    x, w = draw(3, SMALL_ROWS, K), draw(4, 3, G, K, K) / 4

    def loss(x, w, implementation, wrap):
        layer = wrap(lambda x, w: (jnp.tanh(grouped_matmul(x, w, sizes, implementation=implementation)), None))
        return jnp.sum(jax.lax.scan(layer, x, w)[0] ** 2)

    got = jax.jit(jax.value_and_grad(functools.partial(loss, implementation=None, wrap=jax.checkpoint), (0, 1)))
    expected = jax.jit(
        jax.value_and_grad(functools.partial(loss, implementation="reference", wrap=lambda f: f), (0, 1))
    )
    assert_close(got(x, w), expected(x, w))


@pytest.mark.parametrize("implementation", [None, "xla", "pallas_tpu"])
def test_vmap(implementation):
    """Rows and sizes batched, weights shared: the weights' gradient is the sum."""
    sizes_BG = jnp.array([SMALL[0], SMALL[6]])
    lhs, rhs = draw(5, 2, SMALL_ROWS, K), draw(6, G, K, N)

    def loss(lhs, rhs, matmul):
        return jnp.sum(jnp.sin(matmul(lhs, rhs)))

    batched = jax.vmap(functools.partial(grouped_matmul, implementation=implementation), (0, None, 0))
    one = functools.partial(grouped_matmul, implementation="reference")
    gradients = lambda matmul: jax.jit(jax.grad(functools.partial(loss, matmul=matmul), (0, 1)))(lhs, rhs)
    expected = gradients(lambda lhs, rhs: jnp.stack([one(lhs[b], rhs, sizes_BG[b]) for b in range(2)]))
    assert_close(gradients(lambda lhs, rhs: batched(lhs, rhs, sizes_BG)), expected)


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
def test_the_platform_it_is_lowered_for_decides(platform):
    """Also on a host without that platform, and the branches of the others are not emitted."""
    args = (*inputs(RAGGED[0]), jnp.array(RAGGED[0]))
    exported = jax.export.export(jax.jit(value_and_gradients), platforms=[platform])(*args)
    text = exported.mlir_module()
    tiles = platform == "cpu"
    assert ("stablehlo.while" in text) == tiles
    assert ("ragged_dot" in text) == (not tiles)


def test_names():
    args = (*inputs(RAGGED[0])[:2], jnp.array(RAGGED[0]))
    half = [jnp.asarray(a, jnp.float16) for a in args[:2]]
    with pytest.raises(NotImplementedError, match=r"'pallas_gpu' is not available for lhs float16\[300, 12\].*takes b"):
        grouped_matmul(*half, args[2], implementation="pallas_gpu")
    with pytest.raises(ValueError, match="unknown implementation 'xla_tile': did you mean 'xla_tiles'"):
        grouped_matmul(*args, implementation="xla_tile")


def test_choice_is_logged_once(caplog):
    _choose._log_choice_once.cache_clear()
    args = (*inputs(RAGGED[0])[:2], jnp.array(RAGGED[0]))
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        for _ in range(2):
            jax.eval_shape(grouped_matmul, *args)
    assert [r.getMessage() for r in caplog.records if "grouped_matmul" in r.getMessage()] == [
        "grouped_matmul: implementation=None: 'xla_tiles' when lowered for cpu, 'xla' for tpu (K 12 and N 20 should be "
        "multiples of 128), 'xla' for others"
    ]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lhs": jnp.zeros((2, M, K))}, ValueError, r"lhs must have 2 dims \(M K\), got 3"),
        ({"rhs": jnp.zeros((G, K + 1, N))}, ValueError, r"dim 1 of rhs \(K of lhs\): got 13, expected 12"),
        ({"rhs": jnp.zeros((G, K, N), jnp.bfloat16)}, TypeError, "lhs, rhs must share one floating dtype"),
        ({"sizes": jnp.zeros(G)}, TypeError, "group_sizes must be an integer array, got float32"),
        ({"sizes": jnp.zeros(G + 1, jnp.int32)}, ValueError, "length of group_sizes: got 5, expected 4"),
        ({"sizes": jnp.zeros(2, jnp.int32), "offset": 0}, ValueError, "got 2, expected at least 4"),
        ({"offset": jnp.zeros(2, jnp.int32)}, ValueError, "group_offset must be a scalar"),
    ],
)
def test_errors_name_what_was_given(change, error, message):
    given = {"lhs": jnp.zeros((M, K)), "rhs": jnp.zeros((G, K, N)), "sizes": jnp.zeros(G, jnp.int32), "offset": None}
    given |= change
    with pytest.raises(error, match=message):
        grouped_matmul(given["lhs"], given["rhs"], given["sizes"], group_offset=given["offset"])
