"""BlockFFN's router and its two losses against loops over tokens, and their bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_zoo.core import param as P
from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import Dense
from moe_zoo.losses.chunk_sparsity import ChunkSparsity, ChunkSparsityConfig
from moe_zoo.losses.locality import Locality, LocalityConfig
from moe_zoo.routing.block_ffn import BlockFFN, BlockFFNConfig
from moe_zoo.routing.router import Dims

B, S, E = 2, 7, 4
RNG = np.random.default_rng(0)
SCORES = RNG.standard_normal((B * S, E)).astype(np.float32)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1]], np.int32)


def context(padded=True):
    segments = jnp.asarray(SEGMENTS.reshape(-1))
    return RoutingContext(batch=B, seq=S, segment_ids=segments, valid=segments > 0 if padded else None)


def routing(logits=SCORES, probs=None):
    return Routing(Dense(jnp.asarray(logits)), jnp.asarray(logits), None if probs is None else jnp.asarray(probs))


def test_locality_equals_a_loop_over_pairs_of_one_document():
    alpha, total, pairs = 3.0, 0.0, 0
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    scores = SCORES.reshape(B, S, E).astype(float)
    for b in range(B):
        for k in range(S - 1):
            if SEGMENTS[b, k] == SEGMENTS[b, k + 1] and SEGMENTS[b, k + 1]:
                p, q = sigmoid(alpha * scores[b, k]), sigmoid(alpha * scores[b, k + 1])
                total, pairs = total - (q * np.log(p) + (1 - q) * np.log(1 - p)).mean(), pairs + 1
    loss = Locality(LocalityConfig(alpha=alpha))
    assert float(loss(routing(), context())) == pytest.approx(total / pairs, rel=1e-5)
    gradient = jax.grad(lambda z: loss(routing(z), context()))(jnp.asarray(SCORES))
    assert bool((jnp.abs(gradient.reshape(B, S, E)[1]) > 0).all())  # both sides of a pair move
    assert not np.asarray(gradient.reshape(B, S, E)[0, 6]).any()


def test_locality_is_finite_at_the_papers_sharpness_and_vanishes_when_neighbours_agree():
    agree = np.tile(np.float32([5, -5, 5, -5]), (B * S, 1))
    loss = Locality(LocalityConfig())
    assert float(loss(routing(agree), context())) < 1e-6
    assert np.isfinite(float(loss(routing(100 * SCORES), context())))


@pytest.mark.parametrize("length", [3, 7, 64])
def test_chunk_sparsity_equals_a_loop_over_chunks(length):
    p = np.abs(SCORES) / np.abs(SCORES).sum(-1, keepdims=True)
    values, L = [], min(length, S)
    for b in range(B):
        for start in range(0, S, L):
            rows = [t for t in range(start, min(start + L, S)) if SEGMENTS[b, t]]
            if rows:
                off = np.prod([1 - p.reshape(B, S, E)[b, t] + 1e-5 for t in rows], axis=0)
                values.append(1 - off)
    loss = ChunkSparsity(ChunkSparsityConfig(length=length))
    assert float(loss(routing(probs=p), context())) == pytest.approx(np.mean(values), rel=1e-4)


def test_chunk_sparsity_bounds():
    loss = ChunkSparsity(ChunkSparsityConfig(length=S))
    one = np.tile(np.float32([1, 0, 0, 0]), (B * S, 1))
    even = np.full((B * S, E), 1 / E, np.float32)
    assert float(loss(routing(probs=one), context(False))) == pytest.approx(1 / E, abs=1e-4)
    assert float(loss(routing(probs=even), context(False))) == pytest.approx(1 - (1 - 1 / E) ** S, abs=1e-4)


def test_gates_have_length_sqrt_E_and_the_pattern_of_relu():
    D = 12
    router = P.materialize(BlockFFN(BlockFFNConfig(init_std=1.0), Dims(E, D)), 0)
    x = jnp.asarray(RNG.standard_normal((B * S, D)), jnp.float32)
    ctx = RoutingContext(batch=B, seq=S)
    got = router(x, ctx)
    gates, on = np.asarray(got.decision.gates), np.asarray(got.logits) > 0
    np.testing.assert_array_equal(gates != 0, on)
    np.testing.assert_allclose(np.linalg.norm(gates[on.any(1)], axis=1), np.sqrt(E), rtol=1e-3)
    np.testing.assert_allclose(router(7 * x, ctx).decision.gates, gates, rtol=1e-3)
    # a token without an active expert: zero, and finite
    kernel = jnp.where(jnp.arange(E) < 0, router.kernel[...], -jnp.abs(router.kernel[...]))
    off = P.replace(router, {**P.arrays(router), "kernel": kernel})
    value, gradient = jax.value_and_grad(lambda x: off(x, ctx).decision.gates.sum())(jnp.abs(x))
    assert float(value) == 0 and bool((gradient == 0).all())
