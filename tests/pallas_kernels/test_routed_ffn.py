"""routed_ffn: every implementation against the definition, in values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import _tpu_rows, combine_rows, expert_ffn, gather_rows, quantize, routed_ffn
from pallas_kernels.expert_ffn import pallas_tpu_tiles, xla_few

T, K, D, F, E = 16, 2, 16, 32, 4


def draw(seed, *shape, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def plan(seed, rows, dropped=0, experts=E):
    """(group_sizes_E, choice_R, slot_TK) of random choices; the last `dropped` in the order of experts get no row."""
    rng = np.random.default_rng(seed)
    expert_N = rng.choice(experts, size=T * K, p=rng.dirichlet(np.ones(experts)))
    order = np.argsort(expert_N, kind="stable")[: min(rows, T * K - dropped)]
    choice_R, slot = np.full(rows, T * K, np.int32), np.full(T * K, rows, np.int32)
    choice_R[: len(order)], slot[order] = order, np.arange(len(order))
    sizes = np.bincount(expert_N[order], minlength=experts).astype(np.int32)
    return sizes, choice_R, slot.reshape(T, K)


# All choices in place; some dropped and rows empty; fewer rows than choices; no live row, as many as in the second.
PLANS = [plan(0, T * K), plan(1, T * K + 5, 12), plan(2, 20), plan(3, T * K + 5, T * K)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several row tiles to a group, and few copies in a straight run: they compile slowly for CPUs."""
    tiles = lambda cols: _tpu_rows.Tiles(
        rows=32,
        cols=cols,
        body_rows=(16,),
        body_cols=cols,
        weight_buffers=2,
        usual_weights=2,
        deep_rows=32,
        row_buffers=2,
        out_buffers=2,
        zero_rows=32,
        gather_rows=8,
        vmem_limit_bytes=2**24,
    )
    monkeypatch.setattr(
        pallas_tpu_tiles, "tiles", lambda shape, _: tiles(min(shape.N, 256 if shape.pack_outs else 128))
    )


def operands(dims=(D, F), gated=True, dtype=jnp.float32, experts=E):
    D, F = dims
    weights = [draw(i, experts, *shape) / 4 for i, shape in enumerate(((D, F), (D, F), (F, D)))]
    weights[0] = weights[0] if gated else None
    arrays = draw(3, T, D), draw(4, T, D), *weights
    return *(None if a is None else jnp.asarray(a, dtype) for a in arrays), jnp.asarray(draw(5, T, K))


def value_and_gradients(dout, x, w_gate, w_up, w_down, gates, plan, **how):
    run = lambda x, w_gate, w_up, w_down, gates: routed_ffn(x, w_gate, w_up, w_down, *plan, gates, **how)
    out, pullback = jax.vjp(run, x, w_gate, w_up, w_down, gates)
    return out, *pullback(dout)


@functools.cache
def compiled(implementation, **how):
    return jax.jit(functools.partial(value_and_gradients, implementation=implementation, **how))


def assert_close(got, expected, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max(initial=0) <= tolerance * max(np.abs(b).max(initial=0), 1e-30)


@pytest.mark.parametrize("gate_on", ["output", "input"])
@pytest.mark.parametrize(("implementation", "gated"), [("xla", True), ("xla_tiles", True), ("xla_tiles", False)])
def test_equals_reference(implementation, gated, gate_on):
    args = operands(gated=gated)
    for p in PLANS:
        got = compiled(implementation, gate_on=gate_on)(*args, p)
        assert_close(got, compiled("reference", gate_on=gate_on)(*args, p), 2e-6)


@pytest.mark.parametrize(
    ("gate_on", "gated", "dtype", "tolerance"),
    [
        ("output", True, jnp.float32, 2e-6),
        ("output", False, jnp.bfloat16, 1e-2),
    ],
)
def test_tpu_kernels_equal_reference(gate_on, gated, dtype, tolerance):
    args = operands((256, 128), gated, dtype)
    with_floats = [None if a is None else a.astype(jnp.float32) for a in args]
    # each number of rows is a program of its own, and they compile slowly: fewer rows than choices once
    for p in PLANS[1:] if gated else PLANS[1::2]:
        got = compiled("pallas_tpu", gate_on=gate_on)(*args, p)
        assert_close(got, compiled("reference", gate_on=gate_on)(*with_floats, p), tolerance)


def test_gpu_kernels_equal_reference():
    """Also where tokens and gates of dropped choices hold NaN."""
    dout, x, *weights, gates = operands(gated=False, dtype=jnp.bfloat16)
    wide = lambda *arrays: [None if a is None else a.astype(jnp.float32) for a in arrays]
    for p in PLANS[1::2]:
        dropped = p[2] == len(p[1])
        dirty = jnp.where(dropped.all(1)[:, None], jnp.nan, x), *weights, jnp.where(dropped, jnp.nan, gates)
        expected = compiled("reference")(*wide(dout, x, *weights, gates), p)
        assert_close(compiled("pallas_gpu")(dout, *dirty, p), expected, 1e-2)


def test_equals_its_parts():
    dout, x, w_gate, w_up, w_down, gates = operands()
    sizes, choice, slot = PLANS[1]

    def parts(x, w_gate, w_up, w_down, gates):
        rows = gather_rows(x, choice // K, slot)
        return combine_rows(expert_ffn(rows, w_gate, w_up, w_down, sizes), slot, gates, choice)

    out, pullback = jax.vjp(parts, x, w_gate, w_up, w_down, gates)
    got = compiled(None)(dout, x, w_gate, w_up, w_down, gates, PLANS[1])
    assert_close(got, (out, *pullback(dout)), 2e-6)


@pytest.mark.parametrize("implementation", ["xla_tiles", "pallas_tpu"])
def test_what_nobody_refers_to_reaches_nothing(implementation):
    """Tokens and gates of dropped choices hold NaN."""
    sizes, choice, slot = plan(1, T * K, 16)
    dout, x, *weights, gates = operands((128, 128))
    lost = (slot == T * K).all(axis=1)
    assert lost.any()
    x, gates = jnp.where(lost[:, None], jnp.nan, x), jnp.where(slot == T * K, jnp.nan, gates)
    out, dx, *gradients, dgates = compiled(implementation)(dout, x, *weights, gates, (sizes, choice, slot))
    assert all(np.isfinite(a).all() for a in (out, dx, *gradients, dgates))
    assert not np.any(np.asarray(out)[lost]) and not np.any(np.asarray(dx)[lost])
    assert not np.any(np.asarray(dgates)[slot == T * K])


def test_saves_only_tokens_gates_and_pre_activations():
    dout, x, *weights, gates = operands()
    saved = jax.eval_shape(lambda x: jax.vjp(lambda x: routed_ffn(x, *weights, *PLANS[0], gates), x)[1], x)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(saved) if leaf.ndim == 2)
    assert shapes == [(T, K), (T, K), (T, D), (T * K, F), (T * K, F)]


@pytest.mark.parametrize("implementation", [None, "pallas_tpu"])
def test_shard_map_over_experts(implementation):
    """Each device holds some of the experts; their partial sums add up."""
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,))
    dout, x, *weights, gates = operands((128, 128))

    def local(x, weights, gates):
        offset = jax.lax.axis_index("expert") * weights[0].shape[0]
        out = routed_ffn(x, *weights, *PLANS[1], gates, group_offset=offset, implementation=implementation)
        return jax.lax.psum(out, "expert")

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("expert"), P()), out_specs=P())
    out, pullback = jax.vjp(jax.jit(sharded), x, weights, gates)
    dx, dweights, dgates = pullback(dout)
    assert_close((out, dx, *dweights, dgates), compiled("reference")(dout, x, *weights, gates, PLANS[1]), 2e-6)


def test_float64():
    with jax.enable_x64(True):
        args = [jnp.asarray(a, jnp.float64) for a in operands()]
        assert_close(compiled(None)(*args, PLANS[1]), compiled("reference")(*args, PLANS[1]), 1e-13)


def test_errors_name_what_was_given():
    _, x, *weights, gates = operands()
    sizes, choice, slot = PLANS[0]
    with pytest.raises(ValueError, match=r"dim 0 of slot \(T of x\): got 16, expected 15"):
        routed_ffn(x[1:], *weights, sizes, choice, slot, gates)
    with pytest.raises(ValueError, match=r"gates must have shape \[16, 2\], got \[16, 1\]"):
        routed_ffn(x, *weights, sizes, choice, slot, gates[:, 1:])
    with pytest.raises(TypeError, match="choice must be an integer array"):
        routed_ffn(x, *weights, sizes, choice.astype(np.float32), slot, gates)
    with pytest.raises(ValueError, match="unknown gate_on 'out': known: output, input"):
        routed_ffn(x, *weights, sizes, choice, slot, gates, gate_on="out")


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("gate_on", ["output", "input"])
def test_few_rows_are_those_of_the_reference_and_touch_only_the_experts_they_use(gated, gate_on):
    """What None takes on a CPU for fewer rows than experts; weights of unused experts are NaN, as are empty rows'."""
    rng = np.random.default_rng(0)
    expert_TK = np.array([[3, 1], [3, 6]])
    order = np.argsort(expert_TK.reshape(-1), kind="stable")
    slot = np.full(4, 6, np.int32)
    slot[order[:3]] = np.arange(3)  # the choice of expert 6 gets no row; rows 3 to 5 are empty
    choice_R = np.array([*order[:3], 4, 4, 4], np.int32)
    sizes = np.array([0, 1, 0, 2, 0, 0, 0, 0], np.int32)
    weights = [rng.normal(size=shape).astype(np.float32) for shape in ((8, D, F), (8, D, F), (8, F, D))]
    clean = [w if gated or i else None for i, w in enumerate(weights)]
    dirty = [None if w is None else np.where((sizes > 0)[:, None, None], w, np.nan) for w in clean]
    x_TD, gates_TK = rng.normal(size=(2, D)).astype(np.float32), rng.random((2, 2)).astype(np.float32)
    rest = (sizes, choice_R, slot.reshape(2, 2), gates_TK)
    run = lambda weights, **how: routed_ffn(x_TD, *weights, *rest, gate_on=gate_on, **how)
    np.testing.assert_allclose(run(dirty), run(clean, implementation="reference"), rtol=1e-5, atol=1e-5)
    narrow = [None if w is None else quantize(jnp.asarray(w)) for w in clean]
    np.testing.assert_allclose(run(narrow), run(narrow, implementation="reference"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_a_few_more_rows_than_experts_go_through_all_of_them(gated):
    """What None takes on a CPU without a derivative; an empty row is NaN, one expert unused, one choice dropped."""
    rng = np.random.default_rng(0)
    T, E = 5, 4
    expert_R = np.sort(rng.choice([0, 1, 3], 2 * T - 1))
    choice_R = np.array([*rng.permutation(2 * T)[:-1], 2 * T], np.int32)
    slot = np.full(2 * T, 2 * T, np.int32)
    slot[choice_R[:-1]] = np.arange(2 * T - 1)
    weights = [rng.normal(size=shape).astype(np.float32) for shape in ((E, D, F), (E, D, F), (E, F, D))]
    weights = [w if gated or i else None for i, w in enumerate(weights)]
    x_TD, gates_TK = rng.normal(size=(T, D)).astype(np.float32), rng.random((T, 2)).astype(np.float32)
    rest = (np.bincount(expert_R, minlength=E).astype(np.int32), choice_R, slot.reshape(T, 2), gates_TK)
    assert xla_few.suits(len(choice_R), E) and len(choice_R) > E
    for w in (weights, [None if a is None else quantize(jnp.asarray(a)) for a in weights]):
        got, expected = routed_ffn(x_TD, *w, *rest), routed_ffn(x_TD, *w, *rest, implementation="reference")
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
