"""expert_ffn: every implementation against the reference, in values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import expert_ffn
from pallas_kernels.expert_ffn import ACTIVATIONS, reference

R, D, F, E = 300, 12, 20, 4
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


def inputs(sizes, gated=True, dtype=np.float32, experts=E, rows=R):
    """(dy, x, w_gate, w_up, w_down); the rows beyond the last expert hold inf and NaN."""
    dy, x = draw(0, rows, D, dtype=dtype), draw(1, rows, D, dtype=dtype)
    dy[sum(sizes) :], x[sum(sizes) :] = np.inf, np.nan
    w_gate, w_up, w_down = (
        draw(s, experts, *shape, dtype=dtype) / dtype(4) for s, shape in ((2, (D, F)), (3, (D, F)), (4, (F, D)))
    )
    return dy, x, w_gate if gated else None, w_up, w_down


def value_and_gradients(dy, x, w_gate, w_up, w_down, sizes, offset=None, **how):
    y, pullback = jax.vjp(lambda *args: expert_ffn(*args, sizes, group_offset=offset, **how), x, w_gate, w_up, w_down)
    return y, *pullback(dy)


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


@pytest.mark.parametrize(
    ("implementation", "gated"),
    [("xla", True), ("xla", False), ("xla_tiles", True), ("xla_tiles", False), ("pallas_gpu", True)],
)
def test_equals_reference(implementation, gated):
    got, expected = compiled(implementation), compiled("reference")
    for sizes in RAGGED:
        args = (*inputs(sizes, gated), jnp.array(sizes))
        result = got(*args)
        assert_close(result, expected(*args))
        assert not np.any(result[0][sum(sizes) :]) and not np.any(result[1][sum(sizes) :])


def test_reference_equals_a_loop():
    sizes = RAGGED[0]
    _, x, w_gate, w_up, w_down = inputs(sizes)
    rows, end = [], 0
    for e, size in enumerate(sizes):
        x_rD, end = x[end : end + size], end + size
        rows.append((jax.nn.silu(x_rD @ w_gate[e]) * (x_rD @ w_up[e])) @ w_down[e])
    got = expert_ffn(x, w_gate, w_up, w_down, jnp.array(sizes), implementation="reference")
    assert_close(got, np.concatenate(rows))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(activation):
    """Values and derivatives against jax.nn and its autodiff."""
    z = jnp.concatenate([jnp.linspace(-6.0, 6.0, 101), jnp.array([0.0, -40.0, 40.0])])
    value, slope = ACTIVATIONS[activation](z)
    expected, pullback = jax.vjp(reference.ACTIVATIONS[activation], z)
    np.testing.assert_allclose(value, expected, atol=1e-6)
    np.testing.assert_allclose(slope, pullback(jnp.ones_like(z))[0], atol=1e-5)
    sizes = (2, 3, 1, 2)
    _, x, *weights = inputs((R, 0, 0, 0))
    run = lambda name: expert_ffn(x[:8], *weights, jnp.array(sizes), activation=activation, implementation=name)
    assert_close(run("xla_tiles"), run("reference"))


@pytest.mark.parametrize("implementation", ["reference", "xla", "xla_tiles"])
def test_group_offset(implementation):
    held = 2
    run = compiled(implementation)
    for sizes in SMALL:
        dy, x, *weights = inputs(sizes, rows=SMALL_ROWS)
        ends = np.cumsum(sizes)
        for offset in range(E - held + 1):
            part = lambda w, offset=offset: w[offset : offset + held]
            got = run(dy, x, *map(part, weights), jnp.array(sizes), jnp.int32(offset))
            inside = np.zeros((SMALL_ROWS, 1), bool)
            inside[ends[offset] - sizes[offset] : ends[offset + held - 1]] = True
            expected = compiled("reference")(
                np.where(inside, dy, 0), np.where(inside, x, 0), *weights, jnp.array(sizes)
            )
            assert_close(got, (*expected[:2], *map(part, expected[2:])))


@pytest.mark.parametrize("implementation", ["xla", "xla_tiles"])
def test_bfloat16(implementation):
    sizes = SMALL[0]
    args = tuple(a.astype(jnp.bfloat16) for a in inputs(sizes, rows=SMALL_ROWS))
    got = compiled(implementation)(*args, jnp.array(sizes))
    expected = compiled("reference")(*(a.astype(jnp.float32) for a in args), jnp.array(sizes))
    assert all(a.dtype == jnp.bfloat16 for a in got)
    assert_close([a.astype(jnp.float32) for a in got], expected, tolerance=2**-7)


@pytest.mark.parametrize("implementation", ["xla", "xla_tiles"])
def test_float64(implementation):
    with jax.enable_x64(True):
        sizes = jnp.array(SMALL[1])
        args = inputs(SMALL[1], rows=SMALL_ROWS, dtype=np.float64)
        got = compiled(implementation)(*args, sizes)
        assert got[0].dtype == jnp.float64
        assert_close(got, compiled("reference")(*args, sizes), tolerance=1e-13)


def test_saves_only_the_input_and_the_pre_activations():
    args = (*inputs(RAGGED[0]), jnp.array(RAGGED[0]))
    saved = jax.eval_shape(lambda dy, x, *rest: jax.vjp(lambda x: expert_ffn(x, *rest), x)[1], *args)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(saved) if leaf.shape and leaf.shape[0] == R)
    assert shapes == [(R, D), (R, F), (R, F)]


def test_no_rows():
    _, _, *weights = inputs((R, 0, 0, 0))
    got = value_and_gradients(jnp.zeros((0, D)), jnp.zeros((0, D)), *weights, jnp.zeros(E, jnp.int32))
    assert got[0].shape == (0, D) and all(not np.any(g) for g in got)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_rows(check_vma):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sizes = jnp.array(SMALL)
    dy, x, *stacked = (np.stack(a) for a in zip(*(inputs(s, rows=SMALL_ROWS) for s in SMALL)))
    weights = [w[0] for w in stacked]

    def local(x, w_gate, w_up, w_down, sizes):
        return expert_ffn(x[0], w_gate, w_up, w_down, sizes[0])[None]

    specs = (P("data"), P(), P(), P(), P("data"))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=check_vma)
    y, pullback = jax.vjp(lambda *args: jax.jit(sharded)(*args, sizes), x, *weights)
    dx, *dweights = pullback(jnp.asarray(dy))
    parts = [compiled("reference")(dy[d], x[d], *weights, sizes[d]) for d in range(8)]
    assert_close((y, dx), tuple(np.stack([p[i] for p in parts]) for i in range(2)))
    assert_close(dweights, [sum(p[i] for p in parts) for i in range(2, 5)])


def test_shard_map_over_experts():
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))
    sizes = (2, 0, 3, 1, 0, 0, 4, 5, 5, 0, 1, 0, 7, 0, 9, 1)
    dy, x, *weights = inputs(sizes, experts=16, rows=SMALL_ROWS)

    def local(x, w_gate, w_up, w_down, sizes):
        offset = jax.lax.axis_index("expert") * w_up.shape[0]
        return jax.lax.psum(expert_ffn(x, w_gate, w_up, w_down, sizes, group_offset=offset), "expert")

    specs = (P(), P("expert"), P("expert"), P("expert"), P())
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    y, pullback = jax.vjp(lambda *args: jax.jit(sharded)(*args, jnp.array(sizes)), x, *weights)
    expected = compiled("reference")(dy, x, *weights, jnp.array(sizes))
    assert_close((y, *pullback(jnp.asarray(dy))), expected)


def test_scan_and_checkpoint():
    sizes = jnp.array((16, 0, 23, 1))
    _, x, *weights = inputs((SMALL_ROWS,), rows=SMALL_ROWS)
    layers = [np.stack([w, w[::-1], -w]) for w in weights]

    def loss(x, layers, implementation, wrap):
        layer = wrap(lambda x, w: (x + expert_ffn(x, *w, sizes, implementation=implementation), None))
        return jnp.sum(jax.lax.scan(layer, x, layers)[0] ** 2)

    got = jax.jit(jax.value_and_grad(functools.partial(loss, implementation=None, wrap=jax.checkpoint), (0, 1)))
    expected = jax.jit(
        jax.value_and_grad(functools.partial(loss, implementation="reference", wrap=lambda f: f), (0, 1))
    )
    assert_close(got(x, layers), expected(x, layers))


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
def test_the_platform_it_is_lowered_for_decides(platform):
    args = (*inputs(RAGGED[0]), jnp.array(RAGGED[0]))
    text = jax.export.export(jax.jit(value_and_gradients), platforms=[platform])(*args).mlir_module()
    tiles = platform == "cpu"
    assert ("stablehlo.while" in text) == tiles
    assert ("ragged_dot" in text) == (not tiles)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": jnp.zeros(D)}, ValueError, r"x must have 2 dims \(R D\), got 1"),
        ({"x": jnp.zeros((R, D + 1))}, ValueError, r"dim 1 of w_up \(D of x\): got 12, expected 13"),
        ({"w_down": jnp.zeros((E, D, F))}, ValueError, r"w_down must have shape \[4, 20, 12\], got \[4, 12, 20\]"),
        ({"w_gate": jnp.zeros((E, D, F + 1))}, ValueError, r"w_gate must have shape \[4, 12, 20\]"),
        ({"w_gate": jnp.zeros((E, D, F), jnp.bfloat16)}, TypeError, "must share one floating dtype"),
        ({"sizes": jnp.zeros(E + 1, jnp.int32)}, ValueError, "length of group_sizes: got 5, expected 4"),
        ({"activation": "gelu_tan"}, ValueError, "unknown activation 'gelu_tan': did you mean 'gelu_tanh'"),
        (
            {"implementation": "pallas_gpu", "x": jnp.zeros((0, D))},
            NotImplementedError,
            r"'pallas_gpu' is not available for x float32\[0, 12\].*nothing to compute",
        ),
        ({"implementation": "ref"}, ValueError, "did you mean 'reference'"),
    ],
)
def test_errors_name_what_was_given(change, error, message):
    given = dict(x=jnp.zeros((R, D)), w_gate=jnp.zeros((E, D, F)), w_up=jnp.zeros((E, D, F)))
    given |= dict(w_down=jnp.zeros((E, F, D)), sizes=jnp.zeros(E, jnp.int32)) | change
    arrays = [given.pop(name) for name in ("x", "w_gate", "w_up", "w_down", "sizes")]
    with pytest.raises(error, match=message):
        expert_ffn(*arrays, **given)
