"""expert_ffn's TPU kernels: interpreted on CPU against the reference, and compiled for TPUs that are not there."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import _tpu_rows, expert_ffn, quantize, routed_ffn
from pallas_kernels.expert_ffn import pallas_tpu_tiles, reference
from pallas_kernels.expert_ffn.operands import Operands

R, D, F, E = 133, 128, 256, 4
SMALL_TILES = _tpu_rows.Tiles(
    rows=64,
    cols=128,
    body_rows=(32, 16),
    body_cols=128,
    weight_buffers=3,
    usual_weights=2,
    deep_rows=32,
    row_buffers=2,
    out_buffers=2,
    zero_rows=32,
    gather_rows=8,
    vmem_limit_bytes=2**24,
)
# Groups that end inside a fragment, several groups in one fragment, empty groups, one group, no rows, dead rows.
ROUTINGS = [(50, 0, 61, 20), (3, 2, 1, 90), (0, 133, 0, 0), (0, 1, 0, 0), (0, 0, 0, 0), (64, 32, 16, 21)]


def draw(seed, *shape):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def operands(dtype, gated, experts=E):
    weights = [draw(i, experts, *shape) / 8 for i, shape in enumerate(((D, F), (D, F), (F, D)))]
    weights[0] = weights[0] if gated else None
    return tuple(None if a is None else jnp.asarray(a, dtype) for a in (draw(3, R, D), draw(4, R, D), *weights))


def value_and_gradients(dy, x, weights, sizes, offset, **how):
    y, pullback = jax.vjp(lambda x, *w: expert_ffn(x, *w, sizes, group_offset=offset, **how), x, *weights)
    return y, *pullback(dy)


def value_and_dx(dy, x, weights, sizes, offset, **how):
    y, pullback = jax.vjp(lambda x: expert_ffn(x, *weights, sizes, group_offset=offset, **how), x)
    return y, *pullback(dy)


def exact(dy, x, weights, sizes, offset, activation):
    """In float64, of the same numbers."""
    with jax.enable_x64(True):
        wide = lambda a: None if a is None else jnp.asarray(np.asarray(a, np.float64))
        run = lambda *args: reference.forward(Operands(*args, sizes, offset), activation=activation)
        y, pullback = jax.vjp(run, wide(x), *map(wide, weights))
        return y, *pullback(wide(dy))


def assert_close(got, expected, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max(initial=0) <= tolerance * max(np.abs(b).max(initial=0), 1e-30)


def check(routings, dtype, gated, activation, tolerance, offsets=(None,), experts=E, narrow=None):
    """Rows of other experts hold NaN and inf; they must come out zero and reach nothing."""
    run = jax.jit(functools.partial(value_and_gradients, activation=activation, implementation="pallas_tpu"))
    dy, x, *weights = operands(dtype, gated, experts)
    wide = weights
    if narrow:
        weights = [None if w is None else quantize(w, narrow) for w in weights]
        wide = [None if w is None else w.dequantized() for w in weights]
        run = jax.jit(functools.partial(value_and_dx, activation=activation, implementation="pallas_tpu"))
    for sizes in routings:
        for offset in offsets:
            first = sum(sizes[: offset or 0])
            end = first + sum(sizes[offset or 0 :][:experts])
            live = (np.arange(R)[:, None] >= first) & (np.arange(R)[:, None] < end)
            index = None if offset is None else jnp.int32(offset)
            args = jnp.array(sizes, jnp.int32), index
            got = run(jnp.where(live, dy, np.inf), jnp.where(live, x, np.nan), weights, *args)
            assert all(a.dtype == dtype for a in jax.tree.leaves(got))
            assert not any(np.any(np.asarray(a, np.float32)[~live[:, 0]]) for a in got[:2])
            expected = exact(jnp.where(live, dy, 0), x, wide, *args, activation)
            assert_close(got, expected[: len(got)], tolerance)


def test_float32():
    check(ROUTINGS, jnp.float32, gated=True, activation="silu", tolerance=1e-6)


def test_bfloat16_ungated_with_offset(monkeypatch):
    """Many tiles, many column tiles. The pre-activations are saved rounded: gradients carry two more roundings."""
    monkeypatch.setattr(pallas_tpu_tiles, "tiles", lambda *_: SMALL_TILES)
    routings = [(3, 40, 2, 1, 50, 7), (0, 0, 16, 16, 0, 101), (5, 0, 0, 128, 0, 0)]
    check(routings, jnp.bfloat16, False, "gelu", tolerance=8e-3, offsets=(0, 2), experts=3)


def test_small_tiles(monkeypatch):
    monkeypatch.setattr(pallas_tpu_tiles, "tiles", lambda *_: SMALL_TILES)
    # tanh itself is off by 1e-6 where the compiler does not optimize
    check(ROUTINGS, jnp.float32, gated=True, activation="gelu_tanh", tolerance=2e-6)


def test_quantized(monkeypatch):
    """Each column tile with its part of the scales, forward; back, scales of the rows that go in, rounded once more."""
    monkeypatch.setattr(pallas_tpu_tiles, "tiles", lambda *_: SMALL_TILES)
    check(ROUTINGS[:1], jnp.bfloat16, False, "relu2", tolerance=1.2e-2, narrow="float8_e4m3fn")


def test_shard_map():
    """Rows over devices, weights replicated: their gradient is the sum."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    sizes = jnp.array([(10, 7), (0, 24)])
    x, *weights = (jnp.asarray(draw(i, *s), jnp.float32) / 8 for i, s in enumerate(((2, 24, D), *[(2, D, D)] * 3)))

    def loss(x, weights, implementation):
        local = lambda x, w, s: expert_ffn(x[0], *w, s[0], implementation=implementation)[None]
        sharded = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P("data"))
        return jnp.sum(jnp.sin(sharded(x, weights, sizes)))

    run = lambda name: jax.jit(functools.partial(jax.grad(loss, (0, 1)), implementation=name))(x, weights)
    assert_close(run("pallas_tpu"), run("xla"), 1e-5)


def test_refuses_float64():
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="takes bfloat16 and float32, not float64"):
        args = (jnp.zeros((8, 8)), jnp.zeros((1, 8, 8)), jnp.zeros((1, 8, 8)), jnp.zeros((1, 8, 8)))
        expert_ffn(*args, jnp.array([8]), implementation="pallas_tpu")


def test_tiles_fit_and_divide():
    from pallas_kernels import _tpu_target

    for target in (_tpu_target._V5E, _tpu_target._V6E, _tpu_target._TPU7X, _tpu_target.UNKNOWN):
        for M, K, N, G in ((65536, 2048, 1024, 64), (16384, 14336, 4096, 8), (64, 2048, 768, 128), (8, 20, 12, 3)):
            shape = pallas_tpu_tiles.Shape(M, K, N, G, 1, 2, 2, 3, 2, 2)
            t = pallas_tpu_tiles.tiles(shape, target)
            assert t.rows % t.body_rows[0] == 0 and t.cols % t.body_cols == 0 and t.cols <= N
            assert all(rows % 16 == 0 for rows in t.body_rows)
            buffers = t.weight_buffers, t.row_buffers, t.body_rows[0]
            assert pallas_tpu_tiles._bytes(shape, t.rows, t.cols, *buffers) < target.vmem_bytes


@pytest.fixture(scope="module", params=["v5e:2x2", "v6e:2x2"])
def tpu_mesh(request):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_ACCELERATOR_TYPE", "v5litepod-4")):
            patch.setenv(name, value)
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        devices = topologies.get_topology_desc(platform="tpu", topology_name=request.param).devices
        yield Mesh(np.array(devices[:1]), ("x",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize(("dtype", "activation", "gated"), [(jnp.bfloat16, "silu", True), (jnp.float32, "gelu", False)])
def test_compiles_for_tpu(tpu_mesh, dtype, activation, gated):
    """The default choice, with the whole backward pass."""
    dy, x, *weights = operands(dtype, gated)

    step = lambda dy, x, weights, sizes: value_and_gradients(dy, x, weights, sizes, None, activation=activation)
    text = compile_for(tpu_mesh, step, dy, x, weights, jnp.zeros(E, jnp.int32))
    for name in ("expert_ffn_up", "grouped_matmul", "expert_ffn_dhidden", "expert_ffn_dx"):
        assert name in text


def test_routed_compiles_for_tpu(tpu_mesh):
    """Rows are gathered and summed in the kernels: forward, no XLA op makes an array of rows of width D."""
    rows, tokens, width = R + 3, 68, 512
    x, gates = jnp.zeros((tokens, width), jnp.bfloat16), jnp.zeros((tokens, 2))
    w_in, w_out = jnp.zeros((E, width, F), jnp.bfloat16), jnp.zeros((E, F, width), jnp.bfloat16)
    plan = jnp.zeros(E, jnp.int32), jnp.zeros(rows, jnp.int32), jnp.zeros((tokens, 2), jnp.int32)
    text = compile_for(tpu_mesh, routed_ffn, x, w_in, w_in, w_out, *plan, gates)
    assert "combine_rows" in text and f"bf16[{rows},{width}]" not in text
    narrow = [quantize(jnp.zeros(w.shape)) for w in (w_in, w_in, w_out)]
    total = lambda x, w, plan, gates: jnp.sum(routed_ffn(x, *w, *plan, gates).astype(jnp.float32))
    quantized_text = compile_for(tpu_mesh, jax.value_and_grad(total), x, narrow, plan, gates)
    assert "expert_ffn_dx" in quantized_text and f"bf16[{E},{width},{F}]" not in quantized_text
    loss = lambda x, weights, gates, plan: jnp.sum(routed_ffn(x, *weights, *plan, gates).astype(jnp.float32))
    text = compile_for(tpu_mesh, jax.grad(loss, (0, 1, 2)), x, (w_in, w_in, w_out), gates, plan)
    for name in ("expert_ffn_up", "expert_ffn_dhidden", "expert_ffn_dx", "combine_rows"):
        assert name in text


def compile_for(mesh, f, *args):
    """The compiled program's text."""

    def on_mesh(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return f(*args)

    replicated = NamedSharding(mesh, P())
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    return jax.jit(on_mesh, in_shardings=replicated, out_shardings=replicated).lower(*args).compile().as_text()
