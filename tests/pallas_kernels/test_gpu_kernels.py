"""What the GPU kernels share: when they are chosen, which rows a program takes, and what fits.

Their numerics are tested with the ops', interpreted. That they compile: `make kernels-gpu`.
"""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from jax.sharding import PartitionSpec as P

from pallas_kernels import _gpu_schedule, _gpu_target, _gpu_tiles, expert_ffn, grouped_matmul
from pallas_kernels.expert_ffn import gpu_epilogues

KINDS = {"NVIDIA H100 80GB HBM3": 90, "NVIDIA A100-SXM4-80GB": 80, "NVIDIA L4": 89, "NVIDIA GB200": 100}
ARGS = (
    jax.ShapeDtypeStruct((64, 32), jnp.bfloat16),
    jax.ShapeDtypeStruct((4, 32, 48), jnp.bfloat16),
    jax.ShapeDtypeStruct((4,), jnp.int32),
)


def gpu(kind="NVIDIA H100 80GB HBM3", axes=1):
    """What tracing for a GPU sees on a host without one."""
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    types = (jax.sharding.AxisType.Auto,)
    return jax.sharding.use_abstract_mesh(AbstractMesh((axes,), ("x",), abstract_device=device, axis_types=types))


@pytest.mark.parametrize("kind", KINDS)
def test_target(kind):
    with gpu(kind):
        target = _gpu_target.current()
    assert target.capability == KINDS[kind] and target.num_cores == 132
    assert _gpu_target.current() is None


def lowered(function, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("known", [True, False])
def test_none_takes_the_kernel_where_a_gpu_is_known(known):
    """Forward and both gradients; otherwise XLA's, which lowers without knowing the device."""

    def step(lhs, rhs, sizes):
        loss = lambda lhs, rhs: jnp.sum(jnp.sin(grouped_matmul(lhs, rhs, sizes)).astype(jnp.float32))
        return jax.value_and_grad(loss, (0, 1))(lhs, rhs)

    with gpu() if known else contextlib.nullcontext():
        text = lowered(step, *ARGS)
    assert text.count("xla.gpu.triton") == (3 if known else 0)
    assert ("ragged_dot" in text) == (not known)


def test_every_activation_has_a_kernel():
    """The error function is one that the kernels' compilers don't know."""
    rows, weights = jax.ShapeDtypeStruct((64, 32), jnp.bfloat16), jax.ShapeDtypeStruct((4, 32, 32), jnp.bfloat16)
    with gpu():
        call = functools.partial(expert_ffn, activation="gelu", implementation="pallas_gpu")
        text = lowered(call, rows, None, weights, weights, ARGS[2])
    assert text.count("xla.gpu.triton") == 2
    z = np.linspace(-6, 6, 1001, dtype=np.float32)
    assert np.abs(gpu_epilogues.erf(z) - np.vectorize(math.erf)(z)).max() < 6e-7


@pytest.mark.parametrize("implementation", ["pallas_gpu", "mosaic_gpu"])
@pytest.mark.parametrize("op", [grouped_matmul, expert_ffn])
def test_traces_inside_shard_map(op, implementation):
    """Value and gradients, with the check of what varies, which interpreted kernels don't pass."""
    like = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    weights = [like(4, 128, 128)] * (1 if op is grouped_matmul else 3)
    local = lambda rows, sizes, *weights: op(rows, *weights, sizes[0], implementation=implementation)
    specs = (P("x"), P("x"), *(P() for _ in weights))
    sharded = jax.shard_map(local, in_specs=specs, out_specs=P("x"))
    loss = lambda *args: jnp.sum(sharded(*args).astype(jnp.float32))
    step = jax.value_and_grad(loss, (0, *range(2, 2 + len(weights))))
    with gpu(axes=2):
        jaxpr = str(jax.make_jaxpr(step)(like(256, 128), like(2, 4, dtype=jnp.int32), *weights))
    assert "matmul_rows" in jaxpr and "weight_gradient" in jaxpr
    assert ("mosaic" in jaxpr) == (implementation == "mosaic_gpu")


@pytest.mark.parametrize(
    ("offset", "held", "sizes"),
    [
        (0, 5, (9, 0, 16, 17, 3)),
        (0, 5, (0, 0, 0, 0, 0)),
        (0, 5, (0, 61, 0, 0, 0)),
        (1, 3, (9, 0, 16, 17, 3)),
        (2, 2, (1, 1, 59, 0, 0)),
    ],
)
def test_every_row_has_one_tile(offset, held, sizes):
    M, rows = 61, 16
    count = _gpu_schedule.num_row_tiles(M, len(sizes), rows)
    how = dict(num_rows=M, num_groups=len(sizes), held_groups=held, rows=rows)

    def kernel(sizes, out):
        at = _gpu_schedule.row_tile(sizes, jnp.int32(offset), jax.experimental.pallas.program_id(0), **how)
        numbers = jnp.stack([at.group, at.held.astype(jnp.int32), at.row, at.end])
        out[jax.experimental.pallas.ds(jax.experimental.pallas.program_id(0), 1), :] = numbers[None]

    tiles = jax.experimental.pallas.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct((count, 4), jnp.int32), grid=(count,), interpret=True
    )(jnp.array(sizes, jnp.int32))
    ends, owner = np.cumsum(sizes), np.full(M, -1)
    seen = np.zeros(M, int)
    for g in range(offset, offset + held):
        owner[ends[g] - sizes[g] : ends[g]] = g - offset
    for group, is_held, row, end in np.asarray(tiles):
        mine = slice(row, min(row + rows, end))
        seen[mine] += 1
        assert np.all(owner[mine] == (group if is_held else -1))
    assert np.all(seen == 1)


def test_programs_side_by_side():
    """Every tile and column once, in bands."""
    for tiles, columns, width in ((7, 3, 4), (8, 1, 8), (3, 5, 8), (17, 4, 8)):
        at = [_gpu_schedule.swizzled(jnp.int32(i), tiles, columns, width) for i in range(tiles * columns)]
        at = [(int(t), int(c)) for t, c in at]
        assert len(set(at)) == len(at) and max(at) == (tiles - 1, columns - 1) and min(at) == (0, 0)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit(capability, itemsize):
    """Into shared memory with two steps on their way at least, and sums into registers."""
    target = _gpu_target.of(capability, 108)
    shapes = [(65536, 2048, 1024, 64), (16384, 4096, 14336, 8), (65536, 2048, 768, 128), (64, 2048, 1024, 64)]
    for M, K, N, G in [*shapes, (5, 3, 4, 7)]:
        tiles = [_gpu_tiles.row_tiles(M, K, N, G, itemsize, target, sums=n, rhs=n) for n in (1, 2)]
        for n, t in zip((1, 2, 1), [*tiles, _gpu_tiles.weight_tiles(M, K, N, G, itemsize, target)]):
            assert t.stages >= 2 and t.stages * itemsize * t.inner * (t.rows + n * t.cols) <= target.shared_bytes
            assert n * t.rows * t.cols <= 32 * t.warps * 128
            assert all(d >= 16 and d & (d - 1) == 0 for d in (t.rows, t.cols, t.inner))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float16}, "bfloat16 and float32, not float16"),
        ({"rows": 0}, "there is nothing to compute"),
        ({"groups": 4096}, "at most 2047 groups"),
        ({"kind": "Tesla T4"}, "needs compute capability 8.0, the device has 7.5"),
    ],
)
def test_says_why_not(change, reason):
    given = {"rows": 16, "groups": 4, "dtype": jnp.float32, "kind": None} | change
    lhs = jax.ShapeDtypeStruct((given["rows"], 32), given["dtype"])
    rhs = jax.ShapeDtypeStruct((given["groups"], 32, 16), given["dtype"])
    call = functools.partial(grouped_matmul, implementation="pallas_gpu")
    with gpu(given["kind"]) if given["kind"] else contextlib.nullcontext():
        with pytest.raises(NotImplementedError, match=reason):
            jax.eval_shape(call, lhs, rhs, jax.ShapeDtypeStruct((given["groups"],), jnp.int32))
