"""The TPU kernels of grouped_matmul: interpreted against float64, and compiled for real targets where libtpu is there.

Interpreted memory starts out as NaN, and rows of no group are NaN too: what must not be used shows.
"""

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import _tpu_target, grouped_matmul, quantize
from pallas_kernels.grouped_matmul import pallas_tpu, pallas_tpu_tiles

F32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
M, K, N = 150, 24, 384
# Groups in one fragment of rows, across fragments and tiles; empty ones first, inside, last; one, all and no rows.
RAGGED = [
    (0, 3, 2, 1, 5, 0, 40, 90, 0),
    (30, 0, 64, 16, 0, 0, 40, 0, 0),
    (150, 0, 0, 0, 0, 0, 0, 0, 0),
    (0, 0, 0, 0, 0, 0, 0, 0, 150),
    (0, 0, 1, 0, 0, 0, 0, 0, 0),
    (0, 0, 0, 0, 0, 0, 0, 0, 0),
    (17, 16, 17, 16, 17, 16, 17, 16, 17),
    (8, 8, 8, 8, 8, 8, 8, 8, 86),
]
FORWARD_TILES = pallas_tpu_tiles.ForwardTiles(
    rows=64,
    cols=256,  # does not divide N: the last column tile is moved back
    body_rows=(32, 16),
    short_runs=1,
    body_cols=128,
    weight_buffers=4,
    usual_weights=3,
    deep_rows=40,
    least_rows=60,
    lhs_buffers=3,
    out_buffers=2,
    lhs_stays=False,
    zero_rows=32,
    vmem_limit_bytes=2**25,
)
DRHS_TILES = pallas_tpu_tiles.DrhsTiles(
    left_cols=K,
    right_cols=256,
    rows=64,
    body_rows=(32, 16),
    body_cols=K,
    row_buffers=3,
    out_buffers=2,
    zero_rows=K,
    vmem_limit_bytes=2**25,
)
TIGHT = dict(weight_buffers=2, usual_weights=2, lhs_buffers=2, body_rows=(64, 64), short_runs=0, body_cols=256)
STAYS = dict(rows=160, lhs_buffers=1, lhs_stays=True)


def draw(seed, *shape):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def rounded(x, dtype):
    """x in the dtype of the kernel, and what that is in float64."""
    x = jnp.asarray(x, dtype)
    return x, np.asarray(x, np.float64)


def slices(sizes, offset, count):
    ends = np.cumsum(sizes)
    return [slice(ends[g] - sizes[g], ends[g]) for g in range(offset, offset + count)]


def poisoned(x, live):
    """x with NaN in the rows of no group at hand."""
    inside = np.zeros((x.shape[0], 1), bool)
    inside[live[0].start : live[-1].stop] = True
    return jnp.where(inside, x, jnp.nan), ~inside[:, 0]


def assert_close(got, expected, dtype):
    error = np.abs(np.asarray(got, np.float64) - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-30)
    assert error < (4e-3 if dtype == BF16 else 1e-6), error


@functools.cache
def forward(transpose_rhs, out_dtype, **tiles):
    tiles = dataclasses.replace(FORWARD_TILES, **tiles)
    return jax.jit(
        functools.partial(
            pallas_tpu.matmul, transpose_rhs=transpose_rhs, out_dtype=out_dtype, tiles=tiles, interpret=True
        )
    )


@functools.cache
def drhs(num_groups):
    return jax.jit(
        functools.partial(pallas_tpu.weight_gradient, num_groups=num_groups, tiles=DRHS_TILES, interpret=True)
    )


def check_forward(
    sizes, dtype, transpose_rhs=False, out_dtype=None, offset=0, groups=None, rows=M, narrow=None, **tiles
):
    groups, out_dtype = groups or len(sizes), out_dtype or dtype
    live = slices(sizes, offset, groups)
    lhs, lhs64 = rounded(draw(0, rows, K), dtype)
    rhs, rhs64 = rounded(draw(1, groups, N, K) if transpose_rhs else draw(1, groups, K, N), dtype)
    if narrow:
        rhs = quantize(rhs, narrow, axis=2 if transpose_rhs else 1)
        rhs64 = np.asarray(rhs.values, np.float64) * np.asarray(rhs.scale, np.float64)
    lhs, dead = poisoned(lhs, live)
    expected = np.zeros((rows, N))
    for g, group in enumerate(live):
        expected[group] = lhs64[group] @ (rhs64[g].T if transpose_rhs else rhs64[g])
    got = forward(transpose_rhs, out_dtype, **tiles)(lhs, rhs, jnp.array(sizes), jnp.int32(offset))
    assert got.dtype == out_dtype
    assert not np.any(got[dead])
    assert_close(got, expected, out_dtype)


@pytest.mark.parametrize(
    ("dtype", "transpose_rhs", "out_dtype", "tiles"),
    [
        (BF16, False, BF16, {}),
        (F32, True, F32, {}),
        (F32, False, F32, TIGHT),
        (BF16, False, BF16, STAYS),
    ],
)
def test_forward_equals_float64(dtype, transpose_rhs, out_dtype, tiles):
    for sizes in RAGGED:
        check_forward(sizes, dtype, transpose_rhs, out_dtype, **tiles)


@pytest.mark.parametrize(("dtype", "narrow", "transpose_rhs"), [(F32, "int8", False), (BF16, "float8_e4m3fn", True)])
def test_quantized(dtype, narrow, transpose_rhs):
    """Of some groups; each column tile with its part of the scales."""
    for sizes in RAGGED[:2]:
        check_forward(sizes, dtype, transpose_rhs, offset=3, groups=4, narrow=narrow)


@pytest.mark.parametrize("tiles", [{}, STAYS])
def test_forward_of_some_groups(tiles):
    for sizes in RAGGED[:3]:
        for offset in (0, 3, 6):
            check_forward(sizes, BF16, out_dtype=F32, offset=offset, groups=3, **tiles)


@pytest.mark.parametrize("rows", [144, 152, 160])
def test_forward_of_any_number_of_rows(rows):
    """Of half and whole fragments; the last group ends with the array."""
    check_forward((rows - 43, 0, 43), BF16, rows=rows)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_weight_gradient_equals_float64(dtype):
    """Of three of the groups: of those the rows of the others hold NaN."""
    for sizes in RAGGED:
        for offset, groups in ((0, 9), (4, 3)) if sizes in RAGGED[:2] else ((0, 9),):
            live = slices(sizes, offset, groups)
            (left, left64), (right, right64) = rounded(draw(2, M, K), dtype), rounded(draw(3, M, N), dtype)
            (left, _), (right, _) = poisoned(left, live), poisoned(right, live)
            expected = np.stack([left64[group].T @ right64[group] for group in live])
            got = drhs(groups)(left, right, jnp.array(sizes), jnp.int32(offset))
            assert got.dtype == dtype and got.shape == expected.shape
            assert_close(got, expected, dtype)


def test_two_cores(monkeypatch):
    """Which share rows (forward) or tiles of the gradient; interpreted one after the other."""
    monkeypatch.setattr(_tpu_target, "current", lambda: dataclasses.replace(_tpu_target.UNKNOWN, num_cores=2))
    sizes_ref = RAGGED[0]
    (left, left64), (right, right64) = rounded(draw(2, M, K), F32), rounded(draw(3, M, N), F32)
    for sizes in (*RAGGED[:5], RAGGED[7]):
        check_forward(sizes, F32, zero_rows=16)
    expected = np.stack([left64[group].T @ right64[group] for group in slices(sizes_ref, 0, 9)])
    got = pallas_tpu.weight_gradient(
        left, right, jnp.array(sizes_ref), None, num_groups=9, tiles=DRHS_TILES, interpret=True
    )
    assert_close(got, expected, F32)


def value_and_gradients(implementation, lhs, rhs, dout, sizes):
    out, pullback = jax.vjp(lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes, implementation=implementation), lhs, rhs)
    return out, *pullback(dout)


def test_by_name_with_gradients():
    """The public function, with tiles by formula; NaN rows give zeros, also in the gradient."""
    sizes, rows, width = (9, 0, 14, 2), 30, 20
    lhs, rhs, dout = (draw(i, *s).astype(np.float32) for i, s in enumerate([(rows, K), (4, K, width), (rows, width)]))
    lhs[sum(sizes) :], dout[sum(sizes) :] = np.nan, np.inf
    results = [jax.jit(functools.partial(value_and_gradients, name))(lhs, rhs, dout, jnp.array(sizes))
               for name in ("pallas_tpu", "reference")]  # fmt: skip
    for got, expected in zip(*results):
        assert got.dtype == expected.dtype
        assert_close(got, np.asarray(expected, np.float64), F32)
    assert not np.any(results[0][0][sum(sizes) :]) and not np.any(results[0][1][sum(sizes) :])


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    sizes_DG = jnp.array([(5, 0, 7), (0, 1, 15)])
    lhs, rhs, dout = (draw(i, *s).astype(np.float32) for i, s in enumerate([(2, 16, 8), (3, 8, 12), (2, 16, 12)]))

    def gradients(implementation):
        local = lambda x, w, sizes: grouped_matmul(x[0], w, sizes[0], implementation=implementation)[None]
        specs = dict(in_specs=(P("data"), P(), P("data")), out_specs=P("data"), check_vma=check_vma)
        sharded = jax.shard_map(local, mesh=mesh, **specs)
        out, pullback = jax.vjp(lambda lhs, rhs: sharded(lhs, rhs, sizes_DG), lhs, rhs)
        return out, *pullback(jnp.asarray(dout))

    got, expected = (jax.jit(functools.partial(gradients, name))() for name in ("pallas_tpu", "xla"))
    for a, b in zip(got, expected):
        assert_close(a, np.asarray(b, np.float64), F32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float16}, "bfloat16 and float32, not float16"),
        ({"rows": 0}, "there is nothing to compute"),
        ({"inner": 2**20}, "no tiles of K 1048576 and N 128 fit into the 64 MiB of vector memory"),
    ],
)
def test_says_why_not(change, reason):
    given = {"rows": 16, "inner": 128, "dtype": jnp.float32} | change
    lhs = jax.ShapeDtypeStruct((given["rows"], given["inner"]), given["dtype"])
    rhs = jax.ShapeDtypeStruct((2, given["inner"], 128), given["dtype"])
    call = functools.partial(grouped_matmul, implementation="pallas_tpu")
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(call, lhs, rhs, jax.ShapeDtypeStruct((2,), jnp.int32))


@pytest.mark.parametrize("width", [128, 100])
def test_none_takes_the_kernel_where_it_fits(width):
    """Decided when lowered, on a host without a TPU."""
    args = (jnp.zeros((16, width)), jnp.zeros((2, width, 128)), jnp.zeros(2, jnp.int32))
    text = jax.export.export(jax.jit(grouped_matmul), platforms=["tpu"])(*args).mlir_module()
    assert ("tpu_custom_call" in text) == (width == 128)
    assert ("ragged_dot" in text) == (width != 128)


@pytest.mark.parametrize("name", ["v5e", "v5p", "v6e", "tpu7x"])
def test_tiles_fit(name):
    """Common shapes find tiles that fit into vector memory, with at least two row tiles on their way."""
    target = next(t for t in _tpu_target._BY_KIND.values() if t.name == name)
    for rows, inner, outer, groups in [
        (65536, 2048, 1024, 64),
        (16384, 4096, 14336, 8),
        (65536, 2048, 768, 128),
        (16384, 7168, 2048, 32),
        (64, 2048, 1024, 64),
    ]:
        for k, n in ((inner, outer), (outer, inner)):
            t = pallas_tpu_tiles.forward_tiles(rows, k, n, groups, BF16, BF16, BF16, target)
            held = t.weight_buffers * k * t.cols + t.lhs_buffers * t.rows * k + t.out_buffers * t.rows * t.cols
            assert 2 * held < target.vmem_bytes and (t.lhs_buffers >= 3 or t.lhs_stays)
            assert t.rows % t.body_rows[0] == 0 or rows < t.rows + t.body_rows[0]
            d = pallas_tpu_tiles.drhs_tiles(rows, k, n, groups, BF16, target)
            held = d.left_cols * d.right_cols * (4 + 2 * d.out_buffers)
            assert held + 2 * d.row_buffers * d.rows * (d.left_cols + d.right_cols) < target.vmem_bytes
            assert d.left_cols % d.body_cols == 0 and d.left_cols % d.zero_rows == 0 and d.rows % d.body_rows[0] == 0


COMPILE = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pallas_kernels import Quantized, grouped_matmul

devices = topologies.get_topology_desc(platform="tpu", topology_name="TOPOLOGY").devices
mesh = Mesh(np.array(devices[:1]), ("x",))

def compiled(function, *args):
    sharding = NamedSharding(mesh, PartitionSpec())
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in args]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(*args).compile().as_text()

def gradients(lhs, rhs, sizes):
    return jax.grad(lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes).astype(jnp.float32).sum(), (0, 1))(lhs, rhs)

for dtype in (jnp.bfloat16, jnp.float32):
    text = compiled(gradients, ((304, 128), dtype), ((4, 128, 256), dtype), ((4,), jnp.int32))
    # The sum's gradient doesn't need the forward pass.
    assert text.count('custom_call_target="tpu_custom_call"') == 2, text
    text = compiled(grouped_matmul, ((300, 128), dtype), ((4, 128, 256), dtype), ((4,), jnp.int32))
    assert text.count('custom_call_target="tpu_custom_call"') == 1, text

def quantized(lhs, values, scale, sizes):
    return jax.value_and_grad(lambda lhs: grouped_matmul(lhs, Quantized(values, scale), sizes).sum())(lhs)

for dtype, narrow in ((jnp.bfloat16, jnp.int8), (jnp.float32, jnp.float8_e4m3fn), (jnp.bfloat16, jnp.float8_e5m2)):
    args = ((304, 128), dtype), ((4, 128, 256), narrow), ((4, 1, 256), jnp.float32), ((4,), jnp.int32)
    text = compiled(quantized, *args)
    assert text.count('custom_call_target="tpu_custom_call"') == 2, text
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (pip install libtpu), not a TPU")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_compiles_ahead_of_time(topology):
    """By the TPU compiler itself. In a process of its own: libtpu takes its settings from the environment."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    env.pop("XLA_FLAGS", None)
    script = textwrap.dedent(COMPILE).replace("TOPOLOGY", topology)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
