"""Attention against a loop over queries and keys, and its cache against the parallel form."""

import re

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from naive import normal

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.sight import Sight
from moe_zoo.layers.attend import attend, attend_causally
from moe_zoo.layers.attention import Attention, AttentionConfig, View

D = 8


def attention(**settings):
    config = AttentionConfig(**{"num_attention_heads": 4, "head_dim": 4, **settings})
    config.validate("model.attention")
    made = P.materialize(Attention(config, hidden_size=D, out_scale=1.0), 0)
    values = P.arrays(made)
    for i, name in enumerate(n for n in sorted(values) if n.endswith("norm.scale")):
        values[name] = 1 + normal(50 + i, *values[name].shape, scale=0.3)
    return P.replace(made, values)


@jax.jit
def apply(made, x, view, cache=None, at=None):
    view = view.with_rotary({made.rotary_key}, x.dtype)
    return made(x, view, cache, at)


def reference(made, x, view):
    c, positions = made.config, np.asarray(view.positions)
    segments = None if view.segment_ids is None else np.asarray(view.segment_ids)
    valid = None if view.valid is None else np.asarray(view.valid)

    def sees(b, i, j):
        near = c.sliding_window is None or positions[b, i] - positions[b, j] < c.sliding_window
        same = segments is None or segments[b, i] == segments[b, j]
        return j <= i and near and same and (valid is None or valid[b, j])

    scales = (
        {}
        if c.qk_norm == "none"
        else dict(q_scale=np.asarray(made.q_norm.scale[...]), k_scale=np.asarray(made.k_norm.scale[...]))
    )
    weights = [np.asarray(p[...]) for p in (made.q, made.k, made.v, made.o)]
    return naive.attention(x, *weights, sees, positions, c.rope_theta, c.qk_norm, eps=c.norm_eps, **scales)


def rows(*lengths, S):
    """Positions and segment ids of documents packed into one row; what is left is segment 0."""
    positions, segments = np.zeros(S, int), np.zeros(S, int)
    at = 0
    for i, n in enumerate(lengths):
        positions[at : at + n], segments[at : at + n] = np.arange(n), i + 1
        at += n
    return positions, segments


def packed(*rows_of_lengths, S):
    positions, segments = (jnp.asarray(np.stack(a), jnp.int32) for a in zip(*(rows(*r, S=S) for r in rows_of_lengths)))
    return View(positions, segments, segments > 0)


def check(made, x, view):
    out, _ = apply(made, x, view)
    seen = np.ones(out.shape[:2], bool) if view.valid is None else np.asarray(view.valid)
    np.testing.assert_allclose(np.asarray(out)[seen], reference(made, x, view)[seen], rtol=1e-4, atol=1e-5)
    assert np.isfinite(out).all()


PLAIN = View(jnp.broadcast_to(jnp.arange(9), (2, 9)))


@pytest.mark.parametrize("qk_norm, kv", [("none", None), ("none", 1), ("head", 2), ("full", 4), ("full", 2)])
def test_grouped_queries_and_their_norms(qk_norm, kv):
    check(attention(qk_norm=qk_norm, num_key_value_heads=kv), normal(0, 2, 9, D), PLAIN)


@pytest.mark.parametrize("window", [1, 3])
def test_sliding_window(window):
    check(attention(sliding_window=window, num_key_value_heads=2, rope_theta=100.0), normal(1, 2, 9, D), PLAIN)


@pytest.mark.parametrize("window", [None, 3])
def test_packed_documents_with_restarted_positions_and_padding(window):
    check(attention(sliding_window=window, num_key_value_heads=2), normal(2, 2, 9, D), packed((4, 1, 3), (2, 7), S=9))


def test_left_padding():
    valid = jnp.arange(9) >= jnp.array([[0], [4]])
    check(attention(), normal(3, 2, 9, D), View(jnp.maximum(jnp.cumsum(valid, 1) - 1, 0), None, valid))


def test_sequences_of_more_than_one_block():
    made = attention(num_attention_heads=2, num_key_value_heads=1, sliding_window=40)
    check(made, normal(4, 1, 145, D), packed((20, 120), S=145))


def test_one_block_boundary_is_no_boundary():
    """Query 128 opens the second block; it and the last one must see the first key."""
    made, x = attention(num_attention_heads=1), normal(5, 1, 131, D)
    view = View(jnp.arange(131)[None])
    a, b = (np.asarray(apply(made, v, view)[0]) for v in (x, x.at[0, 0].add(5.0)))
    assert (np.abs(a - b).max(-1) > 1e-4)[0, [0, 127, 128, 130]].all()


@pytest.mark.parametrize("window, chunks", [(None, (5, 1, 1, 1, 1)), (3, (1, 5, 3)), (3, (9,))])
def test_cached_decoding_in_chunks_equals_the_parallel_form_with_left_padding(window, chunks):
    made, x = attention(sliding_window=window, num_key_value_heads=2), normal(6, 2, 9, D)
    valid = jnp.arange(9) >= jnp.array([[0], [3]])
    view = View(jnp.maximum(jnp.cumsum(valid, 1) - 1, 0), None, valid)
    whole, _ = apply(made, x, view)
    cache, at, parts = made.init_cache(2, 12, x.dtype), 0, []
    for n in chunks:
        cut = slice(at, at + n)
        out, cache = apply(made, x[:, cut], View(view.positions[:, cut], None, valid[:, cut]), cache, jnp.int32(at))
        parts.append(np.asarray(out))
        at += n
    got = np.concatenate(parts, 1)[np.asarray(valid)]
    np.testing.assert_allclose(got, np.asarray(whole)[np.asarray(valid)], rtol=1e-4, atol=1e-5)


def test_a_query_that_may_see_nothing_averages_all_values():
    q, k, v = normal(7, 1, 2, 3, 4), normal(8, 1, 1, 5, 4), normal(9, 1, 1, 5, 4)
    out = jax.jit(attend)(q, k, v, jnp.zeros((1, 3, 5), bool))
    np.testing.assert_allclose(
        out, np.broadcast_to(np.asarray(v).mean(2, keepdims=True), out.shape), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("window, sinks, groups", [(None, False, 1), (40, True, 2)])
def test_gradients_equal_those_of_the_plain_form(window, sinks, groups):
    """Over two blocks, packed documents, padding on both sides, queries that may see nothing."""
    S, H = 145, 4
    positions, segments = (jnp.asarray(a)[None] for a in rows(30, 100, S=S))
    valid = (segments > 0) & (jnp.arange(S) >= 3)
    q, k, v = normal(0, 1, 2 * groups, S, H), normal(1, 1, 2, S, H), normal(2, 1, 2, S, 3)
    g, sink = normal(3, 1, 2 * groups, S, 3), normal(4, 2 * groups) if sinks else None
    sight = Sight(positions, positions, segments, valid)
    mask = sight.mask(slice(0, S), slice(0, S), window)
    assert not mask.any(-1).all()
    seen = mask.any(-1)[:, None, :, None]  # the others average what their block holds: there the forms differ

    @jax.jit
    def both(q, k, v, sink):
        plain = lambda q, k, v, sink: jnp.vdot(attend(q, k, v, mask, None, sink), jnp.where(seen, g, 0))
        ours = lambda *x: jnp.vdot(attend_causally(*x, sight, window), jnp.where(seen, g, 0))
        which = (0, 1, 2, 3) if sinks else (0, 1, 2)
        return [jax.value_and_grad(f, which)(q, k, v, sink) for f in (plain, ours)]

    for want, got in zip(*map(jax.tree.leaves, both(q, k, v, sink)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        assert np.abs(np.asarray(got)).max() > 1e-3


def test_a_query_that_may_see_nothing_has_no_gradient_but_of_the_mean():
    q, k, v = normal(0, 1, 1, 3, 4), normal(1, 1, 1, 3, 4), normal(2, 1, 1, 3, 4)
    sight = Sight(jnp.arange(3)[None], jnp.arange(3)[None], None, jnp.zeros((1, 3), bool))
    dq, dk, dv = jax.grad(lambda *x: attend_causally(*x, None, sight).sum(), (0, 1, 2))(q, k, v)
    assert not np.asarray(dq).any() and not np.asarray(dk).any()
    np.testing.assert_allclose(dv, np.ones_like(dv), rtol=1e-6)


def test_nothing_as_large_as_the_scores_is_kept_for_the_backward_pass():
    q = normal(0, 1, 1, 256, 4).astype(jnp.bfloat16)
    places = jnp.arange(256)[None]
    _, pull = jax.vjp(lambda q: attend_causally(q, q, q, None, Sight(places, places)), q)
    assert max(x.size for x in jax.tree.leaves(pull)) <= q.size
    assert pull(q)[0].dtype == jnp.bfloat16


def test_low_precision_softmax_runs_in_float32():
    """700 equal scores: a softmax in bfloat16 rounds its exponentials and its sum, and is no distribution any more."""
    q, k = normal(10, 1, 1, 1, 4).astype(jnp.bfloat16), normal(11, 1, 1, 700, 4).astype(jnp.bfloat16)
    traced = jax.make_jaxpr(attend)(q, k, k, jnp.ones((1, 1, 700), bool))
    assert re.findall(r":(\w+)\[[\d,]*\] = exp ", str(traced)) == ["f32"]
    assert traced.out_avals[0].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(num_key_value_heads=3), ["num_key_value_heads", "3", "4"]),
        (dict(head_dim=5), ["head_dim", "5"]),
        (dict(sliding_window=0), ["sliding_window", "0"]),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, words):
    with pytest.raises(ConfigError) as error:
        attention(**settings)
    assert all(w in str(error.value) for w in ["model.attention.", *words])


def test_flops_count_the_projections_and_the_visible_keys():
    D_, N, M, H = D, 4, 2, 4
    projections = 2 * (D_ * N * H + 2 * D_ * M * H + N * H * D_)
    assert attention(num_key_value_heads=2).flops_per_token(10) == projections + 2 * 2 * N * H * 10
    assert attention(num_key_value_heads=2, sliding_window=3).flops_per_token(10) == projections + 2 * 2 * N * H * 3
