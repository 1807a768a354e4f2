"""low_rank_matmul: every form and implementation against the definition, in values and gradients."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import low_rank_matmul
from pallas_kernels.low_rank import pallas_tpu, pallas_tpu_grouped

T, D, N, E, R, K = 21, 12, 20, 4, 3, 2


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Two steps, the last one partial; experts of several tiles."""
    monkeypatch.setattr(pallas_tpu, "_BLOCKS", (16,))
    monkeypatch.setattr(pallas_tpu_grouped, "_ROWS", 8)


def draw(seed, *shape):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def choices():
    """Some of no expert, none of expert 1, one token that names an expert twice, one that names nobody."""
    ids = np.random.default_rng(0).choice([0, 2, 3, E], (T, K)).astype(np.int32)
    ids[3], ids[5] = 2, E
    return ids


def operands(by_ids, dtype=jnp.float32):
    x, a, b, onto = draw(1, T, D), draw(2, E, R, D) / 3, draw(3, E, R, N), draw(4, T, N)
    gates = draw(5, T, K if by_ids else E)
    gates[7] = 0
    return *(jnp.asarray(v, dtype) for v in (x, a, b, onto)), jnp.asarray(gates)


@functools.cache
def compiled(by_ids, form, implementation):
    """(operands) -> (out, gradients of all that have one)."""
    ids = choices() if by_ids else None

    def run(x, a, b, onto, gates):
        return low_rank_matmul(x, a, b, gates, ids, onto_TN=onto, form=form, implementation=implementation)

    def both(*args):
        out, pullback = jax.vjp(run, *args)
        return out, pullback(draw(6, T, N).astype(out.dtype))

    return jax.jit(both)


def assert_close(got, expected, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max(initial=0) <= tolerance * max(np.abs(b).max(initial=0), 1e-30)


@pytest.mark.parametrize(
    ("by_ids", "form", "implementation"),
    [
        (False, None, "xla"),
        (False, None, "pallas_tpu"),
        (True, "dense", "xla"),
        (True, "grouped", "xla"),
        (True, "dense", "pallas_tpu"),
        (True, "grouped", "pallas_tpu"),
        (True, "grouped", "pallas_gpu"),
    ],
)
def test_equals_the_definition(by_ids, form, implementation):
    args = operands(by_ids)
    got = compiled(by_ids, form, implementation)(*args)
    assert_close(got, compiled(by_ids, None, "reference")(*args), 2e-6)
    if by_ids:  # the gate of nobody has no gradient
        assert not np.any(np.asarray(got[1][4])[choices() == E]) and not np.any(np.asarray(got[1][1])[1])


def test_the_definition_is_a_loop_over_tokens():
    x, a, b, onto, gates = (np.asarray(v, np.float64) for v in operands(True))
    expected = onto.copy()
    for t, ids in enumerate(choices()):
        for k, e in enumerate(ids):
            if e < E:
                expected[t] += gates[t, k] * (x[t] @ a[e].T) @ b[e]
    assert_close(compiled(True, None, "reference")(*operands(True))[0], expected, 1e-6)


@pytest.mark.parametrize("by_ids", [False, True])
def test_bfloat16_sums_in_float32(by_ids):
    args = operands(by_ids, jnp.bfloat16)
    wide = [jnp.asarray(v, jnp.float32) for v in args]
    got = compiled(by_ids, "dense", "pallas_tpu")(*args)
    assert [v.dtype for v in jax.tree.leaves(got)] == [jnp.bfloat16] * 5 + [jnp.float32]
    assert_close(got, compiled(by_ids, None, "reference")(*wide), 2e-2)


@pytest.mark.parametrize(("form", "implementation"), [("grouped", "xla"), ("dense", "pallas_tpu")])
def test_shard_map(form, implementation):
    """Tokens sharded, weights replicated: their gradients are summed."""
    mesh = jax.make_mesh((3,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:3])
    x, a, b, onto, gates = operands(True)

    def local(x, gates, onto, ids, a, b):
        return low_rank_matmul(x, a, b, gates, ids, onto_TN=onto, form=form, implementation=implementation)

    specs = (P("data"),) * 4 + (P(), P())
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"))

    @jax.jit
    def both(x, a, b, onto, gates):
        out, pullback = jax.vjp(lambda x, a, b, onto, gates: sharded(x, gates, onto, choices(), a, b), *args)
        return out, pullback(draw(6, T, N))

    args = x, a, b, onto, gates
    assert_close(both(*args), compiled(True, None, "reference")(*args), 2e-6)


def test_errors_name_what_was_given():
    x, a, b, onto, gates = operands(True)
    with pytest.raises(ValueError, match=r"gates must have shape \[21, 4\], got \[21, 2\]"):
        low_rank_matmul(x, a, b, gates)
    with pytest.raises(ValueError, match=r"a must have shape \[4, 3, 12\], got \[4, 3, 11\]"):
        low_rank_matmul(x, a[:, :, 1:], b, gates, choices())
    with pytest.raises(ValueError, match="'grouped' sorts choices: it needs ids"):
        low_rank_matmul(x, a, b, draw(0, T, E), form="grouped")
    with pytest.raises(ValueError, match="form must be one of dense, grouped"):
        low_rank_matmul(x, a, b, gates, choices(), form="sorted")
    with pytest.raises(TypeError, match="must share one floating dtype"):
        low_rank_matmul(x, a, b.astype(jnp.bfloat16), gates, choices())
    wide = jnp.zeros((2, 4096, D)), jnp.zeros((2, 4096, N)), jnp.zeros((T, 2))
    with pytest.raises(NotImplementedError, match="at most 4096 ranks in all, E R = 8192"):
        low_rank_matmul(x, *wide, implementation="pallas_tpu")


COMPILED = [("v5e:2x2", "gates"), ("v6e:2x2", "ids"), ("tpu7x:2x2x1", "gates"), ("v6e:2x2", "grouped")]


@pytest.mark.parametrize(("topology", "how"), COMPILED)
def test_compiles_for_tpu(topology, how, monkeypatch):
    """None takes the kernels, one each way; what lies between the products is in no array of the program."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    monkeypatch.setattr(pallas_tpu, "_BLOCKS", (128,))
    monkeypatch.setattr(pallas_tpu_grouped, "_ROWS", 128)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices[:1]), ("data",))
    T, D, N, E, R, K = 300, 256, 384, 8, 16, 8 if how == "gates" else 2
    bf16 = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16)
    args = bf16(T, N), bf16(T, D), bf16(E, R, D), bf16(E, R, N), jax.ShapeDtypeStruct((T, K), jnp.float32)
    ids = None if how == "gates" else jax.ShapeDtypeStruct((T, K), jnp.int32)

    def both(dout, x, a, b, gates, ids):
        form = "grouped" if how == "grouped" else "dense"
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            run = lambda x, a, b, gates, onto: low_rank_matmul(x, a, b, gates, ids, onto_TN=onto, form=form)
            out, pullback = jax.vjp(run, x, a, b, gates, dout)
            return out, pullback(dout)

    jitted = jax.jit(both, in_shardings=NamedSharding(mesh, P()), out_shardings=NamedSharding(mesh, P()))
    # the cache could not load it again: there is no such device
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        text = jitted.lower(*args, ids).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    rows = -(-T * K // 128) * 128 + E * 128 if how == "grouped" else T
    assert not {f"[{rows},{R}]", f"[{rows},{E * R}]"} & set(re.findall(r"\[\d+,\d+\]", text))
