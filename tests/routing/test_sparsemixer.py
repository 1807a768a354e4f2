"""SparseMixer: picks one after the other against a loop over tokens; samples and gradients in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import context, normal, softmax

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.routing.router import Dims
from moe_zoo.routing.sparsemixer import SparseMixer, SparseMixerConfig, pick

T, D, E, EPS = 50, 5, 6, 0.2


@pytest.fixture(scope="module")
def router():
    config = SparseMixerConfig(jitter_eps=EPS, init_std=1.0, num_experts_per_tok=3)
    return P.materialize(SparseMixer(config, Dims(num_experts=E, hidden_size=D)), 0)


def loop(z, K):
    experts, gates, left = [], [], list(range(len(z)))
    for _ in range(K):
        best = max(z[e] for e in left)
        near = [e for e in left if (best - z[e]) / max(abs(z[e]), best) <= 2 * EPS]
        p = softmax(np.array([z[e] for e in near]))
        e = max(left, key=lambda e: z[e])
        experts.append(e)
        gates.append(p[near.index(e)])
        left.remove(e)
    return experts, gates


def test_picks_and_gates_are_those_of_the_loop(router):
    x = normal(0, T, D)
    logits = np.asarray(x, np.float64) @ np.asarray(router.kernel[...], np.float64)
    decision = jax.jit(lambda x: router(x, context(T)).decision)(x)
    shared = 0
    for t in range(T):
        experts, gates = loop(logits[t], 3)
        np.testing.assert_array_equal(decision.experts[t], experts)
        np.testing.assert_allclose(decision.gates[t], gates, rtol=1e-4)
        shared += gates[0] < 0.99
    assert 5 < shared < T - 5, "some softmaxes have one expert, some several"


def test_clear_choices_have_gate_one_and_equal_logits_share():
    gate = lambda z: np.asarray(pick(jnp.asarray([z]), jnp.ones((1, 4), bool), 0.01)[1])[0]
    assert gate([9.0, 1.0, 2.0, 3.0]) == 1.0
    np.testing.assert_allclose(gate([2.0, 2.0, 1.0, -1.0]), 0.5, rtol=1e-6)
    np.testing.assert_allclose(gate([0.0, 0.0, 0.0, 0.0]), 0.25, rtol=1e-6)


def test_training_samples_near_experts_by_their_softmax_and_scales_by_heuns_rule():
    z, n = np.array([2.0, 1.9, 1.5, -3.0]), 4000
    free = jnp.ones((n, 4), bool)
    expert, gate = jax.jit(pick, static_argnums=2)(
        jnp.tile(jnp.asarray(z, jnp.float32), (n, 1)), free, 0.05, jax.random.key(0)
    )
    expert, gate = np.asarray(expert), np.asarray(gate)
    p = softmax(z[:2])
    np.testing.assert_allclose(np.bincount(expert, minlength=4) / n, [*p, 0, 0], atol=0.03)
    np.testing.assert_allclose(gate[expert == 0], p[0], rtol=1e-5)
    whole = np.isclose(gate[expert == 1], p[1], rtol=1e-4)
    np.testing.assert_allclose(gate[expert == 1][~whole], p[1] / 3, rtol=1e-4)
    assert whole.mean() == pytest.approx(0.25, abs=0.04)


def test_the_gradient_is_that_of_the_probability_whatever_the_scale():
    z = jnp.asarray([[2.0, 1.9, 1.5, -3.0]])
    free = jnp.ones((1, 4), bool)
    for seed in range(6):
        grad = jax.grad(lambda z, seed=seed: pick(z, free, 0.05, jax.random.key(seed))[1].sum())(z)[0]
        e = int(pick(z, free, 0.05, jax.random.key(seed))[0][0])
        p = np.append(softmax(np.asarray(z[0, :2], np.float64)), [0, 0])
        np.testing.assert_allclose(grad, p[e] * (np.eye(4)[e] - p), atol=1e-6)


@pytest.mark.parametrize("settings", [dict(jitter_eps=-1.0), dict(num_experts_per_tok=0), dict(init_std=0.0)])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=r"router\."):
        SparseMixerConfig(**settings).validate("router")
    with pytest.raises(ConfigError, match="at most 4"):
        SparseMixerConfig(num_experts_per_tok=5).validate_for(4, "router")
