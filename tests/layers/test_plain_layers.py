"""Norms, rotary positions, embeddings and the dense feed-forward against their formulas."""

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from naive import normal

from moe_zoo.core import param as P
from moe_zoo.layers.embedding import Embedding, Head
from moe_zoo.layers.mlp import MLP, FeedForwardConfig
from moe_zoo.layers.norm import LayerNorm, RMSNorm
from moe_zoo.layers.rope import angles, rotate

D = 12


def scaled(module):
    made = P.materialize(module, 0)
    return P.replace(made, {n: a + normal(i, *a.shape, scale=0.5) for i, (n, a) in enumerate(P.arrays(made).items())})


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_norms_are_their_formulas_in_the_type_of_their_input(dtype, tolerance):
    x, rms, layer = (normal(0, 3, D) * 4 + 2).astype(dtype), scaled(RMSNorm(D, 1e-3)), scaled(LayerNorm(D, 1e-3))
    a, b = jax.jit(lambda x: (rms(x), layer(x)))(x)
    assert a.dtype == b.dtype == dtype
    x, scale, bias = np.asarray(x, np.float64), np.asarray(layer.scale[...]), np.asarray(layer.bias[...])
    np.testing.assert_allclose(
        np.asarray(a, np.float64), naive.rms_norm(x, np.asarray(rms.scale[...]), 1e-3), rtol=tolerance, atol=tolerance
    )
    np.testing.assert_allclose(
        np.asarray(b, np.float64), naive.layer_norm(x, scale, bias, 1e-3), rtol=tolerance, atol=tolerance
    )


def test_norm_statistics_of_low_precision_inputs_are_wide():
    """Summing 4096 squares in bfloat16 would stall at 256 and be far off."""
    x = jnp.full((1, 4096), 2.0, jnp.bfloat16)
    out = P.materialize(RMSNorm(4096, 1e-6), 0)(x)
    np.testing.assert_allclose(np.asarray(out, np.float32), 1, rtol=1e-2)


def test_a_row_of_zeros_stays_finite():
    for norm in (RMSNorm(D, 1e-6), LayerNorm(D, 1e-6)):
        assert np.isfinite(P.materialize(norm, 0)(jnp.zeros((1, D)))).all()


turned = jax.jit(lambda x, positions, theta=100.0: rotate(x, angles(positions, x.shape[-1], theta)))


def test_rotation_turns_each_pair_by_its_own_angle():
    x, positions = normal(1, 2, 3, 5, 6), jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 5)))
    out = np.asarray(turned(x, positions))
    for b in range(2):
        for s in range(5):
            for n in range(3):
                np.testing.assert_allclose(
                    out[b, n, s], naive.rope(np.asarray(x[b, n, s]), int(positions[b, s]), 100.0), rtol=1e-4, atol=1e-5
                )


def test_products_of_rotated_vectors_depend_on_distance_only():
    q, k = normal(2, 1, 1, 4, 8), normal(3, 1, 1, 4, 8)
    a, b = jnp.array([[3, 0, 7, 5]]), jnp.array([[1, 4, 7, 0]])
    dots = lambda shift: np.asarray((turned(q, a + shift) * turned(k, b + shift)).sum(-1))
    np.testing.assert_allclose(dots(0), dots(37), rtol=1e-4, atol=1e-4)
    assert np.abs(dots(0) - np.asarray((turned(q, a + 1) * turned(k, b)).sum(-1))).max() > 0.1


def test_rotation_keeps_lengths_and_position_zero_keeps_everything():
    x = normal(4, 1, 2, 3, 6)
    np.testing.assert_array_equal(turned(x, jnp.zeros((1, 3), int)), x)
    norms = np.linalg.norm(turned(x, jnp.array([[5, 9, 1000]])), axis=-1)
    np.testing.assert_allclose(norms, np.linalg.norm(x, axis=-1), rtol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_dense_feed_forward_is_the_formula(gated):
    made, x = (
        P.materialize(MLP(FeedForwardConfig(gated=gated), hidden_size=D, intermediate_size=7, out_scale=1.0), 0),
        normal(5, 4, D),
    )
    gate = np.asarray(made.w_gate[...]) if gated else None
    expected = naive.ffn(np.asarray(x, np.float64), gate, np.asarray(made.w_up[...]), np.asarray(made.w_down[...]))
    np.testing.assert_allclose(jax.jit(lambda x: made(x))(x), expected, rtol=1e-4, atol=1e-5)
    assert made.flops_per_token() == 2 * D * 7 * (3 if gated else 2)


def test_tied_logits_are_products_with_the_rows_of_the_table():
    table, head, x = P.materialize(Embedding(9, D), 0), P.materialize(Head(9, D), 0), normal(6, 1, 2, D)
    weights = np.asarray(table.table[...])
    np.testing.assert_array_equal(table(jnp.array([[3, 8]]), jnp.float32)[0], weights[[3, 8]])
    np.testing.assert_allclose(table.attend(x), np.asarray(x) @ weights.T, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(head(x), np.asarray(x) @ np.asarray(head.kernel[...]), rtol=1e-4, atol=1e-5)
