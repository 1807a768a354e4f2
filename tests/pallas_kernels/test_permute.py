"""gather_rows and combine_rows against plain indexing, in values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import combine_rows, gather_rows
from pallas_kernels.permute import pallas_gpu

T, K, D = 37, 3, 8


def routes(rows, dropped, seed=0):
    """A random one-to-one map between choices and rows: (choice_R, token_R, slot_TK); some rows stay empty."""
    rng = np.random.default_rng(seed)
    choices = rng.permutation(T * K)[: T * K - dropped][:rows]
    choice_R, slot = np.full(rows, T * K, np.int32), np.full(T * K, rows, np.int32)
    at = rng.permutation(rows)[: len(choices)]
    choice_R[at], slot[choices] = choices, at
    return choice_R, choice_R // K, slot.reshape(T, K)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def naive_gather(x_TD, token_R):
    return jnp.concatenate([x_TD, jnp.zeros_like(x_TD[:1])])[token_R]


def naive_combine(y_RD, slot_TK, gates_TK):
    rows_TKD = jnp.concatenate([y_RD, jnp.zeros_like(y_RD[:1])])[slot_TK]
    return jnp.einsum("tk,tkd->td", gates_TK, rows_TKD)


# All choices in place; choices dropped and rows empty; fewer rows than choices; more rows; no live row.
CASES = [(T * K, 0), (T * K, 20), (50, 0), (T * K + 9, 5), (16, T * K)]


@pytest.mark.parametrize(("rows", "dropped"), CASES)
def test_gather_equals_indexing(rows, dropped):
    _, token_R, slot_TK = routes(rows, dropped)
    x_TD, d_RD = draw(1, T, D), draw(2, rows, D)
    got, pullback = jax.vjp(lambda x: gather_rows(x, token_R, slot_TK), x_TD)
    expected, naive_pullback = jax.vjp(lambda x: naive_gather(x, token_R), x_TD)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(pullback(d_RD)[0], naive_pullback(d_RD)[0], atol=1e-6)


@pytest.mark.parametrize(("rows", "dropped"), CASES)
def test_combine_equals_indexing(rows, dropped):
    choice_R, _, slot_TK = routes(rows, dropped)
    y_RD, gates_TK, d_TD = draw(1, rows, D), draw(2, T, K), draw(3, T, D)
    got, pullback = jax.vjp(lambda y, gates: combine_rows(y, slot_TK, gates, choice_R), y_RD, gates_TK)
    expected, naive_pullback = jax.vjp(lambda y, gates: naive_combine(y, slot_TK, gates), y_RD, gates_TK)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    for a, b in zip(pullback(d_TD), naive_pullback(d_TD), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("D", "gated"), [(8, True), (600, False)])
def test_the_gpu_kernel_sums_alike(D, gated):
    """Neither tokens nor columns fill their tiles; gates of dropped choices and rows of none hold NaN."""
    choice_R, _, slot_TK = routes(T * K + 5, 20)
    dropped = slot_TK == len(choice_R)
    y_RD, gates_TK = draw(0, len(choice_R), D), draw(1, T, K) if gated else None
    expected = naive_combine(y_RD, slot_TK, gates_TK if gated else np.ones((T, K), np.float32))
    y_RD[choice_R == T * K] = np.nan
    gates_TK = np.where(dropped, np.nan, gates_TK) if gated else None
    got = pallas_gpu.sum_choices(*map(jnp.asarray, (y_RD, slot_TK)), gates_TK, interpret=True)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_rows_nobody_refers_to_reach_nothing():
    choice_R, token_R, slot_TK = routes(T * K, 20)
    empty = choice_R == T * K
    assert empty.any()
    y_RD = np.where(empty[:, None], np.nan, draw(1, T * K, D))
    gates_TK, d_TD = draw(2, T, K), draw(3, T, D)
    out, pullback = jax.vjp(lambda y, gates: combine_rows(y, slot_TK, gates, choice_R), y_RD, gates_TK)
    dy_RD, dgates_TK = pullback(d_TD)
    assert np.isfinite(out).all() and np.isfinite(dgates_TK).all()
    assert not np.any(dy_RD[empty]) and not np.any(dgates_TK[slot_TK == T * K])
    # The same for the gather: gradients of empty rows, and tokens whose choices were all dropped.
    unrouted = (slot_TK == T * K).all(axis=1)
    x_TD = np.where(unrouted[:, None], np.nan, draw(4, T, D))
    rows, pullback = jax.vjp(lambda x: gather_rows(x, token_R, slot_TK), x_TD)
    assert np.isfinite(rows).all() and not np.any(rows[empty])
    (dx_TD,) = pullback(np.where(empty[:, None], np.nan, draw(5, T * K, D)))
    assert np.isfinite(dx_TD).all() and not np.any(dx_TD[unrouted])


def test_no_scatter_and_no_choice_by_row_array():
    """The derivatives are gathers too, and (T, K, D) is never made."""
    choice_R, token_R, slot_TK = routes(T * K, 5)

    def loss(x, gates):
        return jnp.sum(combine_rows(gather_rows(x, token_R, slot_TK), slot_TK, gates, choice_R) ** 2)

    text = jax.jit(jax.grad(loss, (0, 1))).lower(draw(1, T, D), draw(2, T, K)).as_text()
    assert "scatter" not in text and f"{T}x{K}x{D}" not in text


def test_bfloat16_sums_in_float32():
    choice_R, _, slot_TK = routes(T * K, 5)
    y_RD, gates_TK = draw(1, T * K, D).astype(jnp.bfloat16), draw(2, T, K)
    out = combine_rows(y_RD, slot_TK, gates_TK, choice_R)
    assert out.dtype == jnp.bfloat16
    expected = naive_combine(y_RD.astype(np.float32), slot_TK, gates_TK).astype(jnp.bfloat16)
    np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), rtol=2**-7)
    d_TD = jnp.ones((T, D), jnp.bfloat16)
    dy_RD, dgates_TK = jax.vjp(lambda y, g: combine_rows(y, slot_TK, g, choice_R), y_RD, gates_TK)[1](d_TD)
    assert dy_RD.dtype == jnp.bfloat16 and dgates_TK.dtype == jnp.float32


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_and_checkpoint(check_vma):
    """Routes sharded over 8 devices, tokens replicated: their gradient is the sum over devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    choice, token, slot = (jnp.stack(a) for a in zip(*(routes(60, 10, seed) for seed in range(8))))
    x_TD, gates = draw(1, T, D), draw(2, 8, T, K)

    def layer(x, gates, choice, token, slot):
        return combine_rows(jnp.tanh(gather_rows(x, token, slot)), slot, gates, choice)

    def naive(x, gates, choice, token, slot):
        return naive_combine(jnp.tanh(naive_gather(x, token)), slot, gates)

    def local(x, *rest):
        return jax.checkpoint(layer)(x, *(a[0] for a in rest))[None]

    specs = (P(), *[P("data")] * 4)
    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=check_vma))
    loss = lambda f: lambda x, gates: jnp.sum(jnp.sin(f(x, gates, choice, token, slot)))
    got = jax.value_and_grad(loss(sharded), (0, 1))(x_TD, gates)
    expected = jax.value_and_grad(loss(jax.vmap(naive, in_axes=(None, 0, 0, 0, 0))), (0, 1))(x_TD, gates)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, expected)


def test_float64():
    with jax.enable_x64(True):
        choice_R, token_R, slot_TK = routes(60, 10)
        x_TD = draw(1, T, D).astype(np.float64)
        rows_RD = gather_rows(x_TD, token_R, slot_TK)
        out = combine_rows(rows_RD, slot_TK, np.ones((T, K)), choice_R)
        live_T = (slot_TK < 60).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(out, live_T * x_TD, rtol=1e-14)


def test_errors_name_what_was_given():
    choice_R, token_R, slot_TK = routes(50, 0)
    x_TD, y_RD, gates_TK = draw(1, T, D), draw(1, 50, D), draw(2, T, K)
    with pytest.raises(ValueError, match=r"dim 0 of slot \(T of x\): got 37, expected 36"):
        gather_rows(x_TD[1:], token_R, slot_TK)
    with pytest.raises(TypeError, match="token must be an integer array, got float32"):
        gather_rows(x_TD, token_R.astype(np.float32), slot_TK)
    with pytest.raises(ValueError, match=r"choice must have shape \[50\], got \[49\]"):
        combine_rows(y_RD, slot_TK, gates_TK, choice_R[1:])
    with pytest.raises(ValueError, match=r"gates must have shape \[37, 3\], got \[37, 2\]"):
        combine_rows(y_RD, slot_TK, gates_TK[:, 1:], choice_R)
