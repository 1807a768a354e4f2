"""Noisy top-k: noise, gates, the chance of being chosen, and its two losses against loops."""

import functools
import math

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from naive import context, normal

from moe_zoo.core import param as P
from moe_zoo.core.context import Routing
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.registry import ConfigError
from moe_zoo.losses.variation import ExpectedLoad, Importance, VariationConfig
from moe_zoo.routing.noisy_top_k import NoisyTopK, NoisyTopKConfig, chance
from moe_zoo.routing.router import Dims

T, D, E, K, EPS = 60, 5, 6, 2, 0.01
VALID = np.arange(T) % 4 != 1


@pytest.fixture(scope="module")
def router():
    made = P.materialize(NoisyTopK(NoisyTopKConfig(K, init_std=1.0), Dims(E, D)), 0)
    return P.replace(made, {**P.arrays(made), "noise_kernel": normal(9, D, E)})


@functools.partial(jax.jit, static_argnums=3)
def routed(router, x, key, train, valid=None, inputs=None):
    return router(x, context(x.shape[0], train=train, key=key, valid=valid, inputs=inputs or {}))


def clean_and_scale(router, x):
    kernel, noise = (np.asarray(w[...], np.float64) for w in (router.kernel, router.noise_kernel))
    x = np.asarray(x, np.float64)
    return x @ kernel, np.log1p(np.exp(x @ noise)) + EPS


def test_gates_are_a_softmax_over_the_best_noisy_logits(router):
    x = normal(0, T, D)
    for train in (True, False):
        routing = routed(router, x, jax.random.key(1), train)
        experts, gates = naive.top_k(np.asarray(routing.logits), K)
        np.testing.assert_array_equal(routing.decision.experts, experts)
        np.testing.assert_allclose(routing.decision.gates, gates, rtol=1e-4)
    np.testing.assert_allclose(routing.logits, clean_and_scale(router, x)[0], atol=1e-5)  # no noise without training


def test_noise_is_normal_and_as_wide_as_its_kernel_says(router):
    x = jnp.tile(normal(1, 1, D), (3000, 1))
    clean, scale = clean_and_scale(router, x[:1])
    noise = (np.asarray(routed(router, x, jax.random.key(2), True).logits) - clean) / scale
    np.testing.assert_allclose(noise.mean(0), 0, atol=0.08)
    np.testing.assert_allclose(noise.std(0), 1, atol=0.05)
    np.testing.assert_allclose((np.abs(noise) < 1).mean(0), 0.683, atol=0.03)
    assert np.abs(np.corrcoef(noise.T) - np.eye(E)).max() < 0.08


def test_expected_load_is_the_chance_by_loop_and_padding_has_none(router):
    x = normal(2, T, D)
    clean, scale = clean_and_scale(router, x)
    routing = routed(router, x, jax.random.key(3), True, jnp.asarray(VALID))
    noisy, load = np.asarray(routing.logits, np.float64), np.zeros(E)
    for t in np.nonzero(VALID)[0]:
        for e in range(E):
            kth = sorted(np.delete(noisy[t], e))[-K]
            load[e] += 0.5 * (1 + math.erf((clean[t, e] - kth) / scale[t, e] / math.sqrt(2)))
    np.testing.assert_allclose(routing.aux.terms["expected_load"], load, rtol=1e-4)


def test_chance_is_how_often_an_expert_is_chosen_when_its_own_noise_is_drawn_anew():
    rng = np.random.default_rng(0)
    clean, scale = np.array([0.5, 0.1, -0.3, 0.0]), np.array([0.6, 0.3, 0.9, 0.5])
    noisy = clean + scale * rng.standard_normal(4)
    best = np.sort(noisy)[::-1][: K + 1]
    got = chance(*(jnp.asarray(a)[None] for a in (clean, best, noisy >= best[K - 1], scale)))[0]
    for e in range(4):
        again = np.tile(noisy, (20000, 1))
        again[:, e] = clean[e] + scale[e] * rng.standard_normal(20000)
        assert float(got[e]) == pytest.approx(((-again).argsort(1)[:, :K] == e).any(1).mean(), abs=0.015)


def test_load_is_the_count_without_training_and_with_every_expert_chosen(router):
    x = normal(3, T, D)
    still = routed(router, x, jax.random.key(0), False)
    np.testing.assert_array_equal(still.aux.terms["expected_load"], still.decision.counts())
    every = P.materialize(NoisyTopK(NoisyTopKConfig(E, init_std=1.0), Dims(E, D)), 0)
    np.testing.assert_array_equal(routed(every, x, jax.random.key(0), True).aux.terms["expected_load"], T)


def test_losses_are_squared_coefficients_of_variation():
    gates, experts = jnp.asarray([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]]), jnp.asarray([[0, 1], [0, 2], [1, 0]])
    load = jnp.asarray([1.5, 2.0, 0.5, 0.0])
    routing = Routing(TokenChoice(experts, gates, 4))
    routing.aux.terms["expected_load"] = load
    weight = np.array([1.4, 1.2, 0.4, 0])  # by hand
    for loss, v in ((Importance, weight), (ExpectedLoad, np.asarray(load))):
        got = float(loss(VariationConfig())(routing, context(3)))
        assert got == pytest.approx((v.std() / v.mean()) ** 2, rel=1e-5)
    even = Routing(TokenChoice(jnp.asarray([[0], [1]]), jnp.ones((2, 1)), 2))
    assert float(Importance(VariationConfig())(even, context(2))) == 0


def test_both_losses_reach_both_kernels(router):
    x = normal(4, T, D)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(loss, values):
        ctx = context(T, train=True, key=jax.random.key(5))
        return jax.grad(lambda v: loss(VariationConfig())(P.replace(router, v)(x, ctx), ctx))(values)

    for loss in (Importance, ExpectedLoad):
        for path, g in gradient(loss, P.arrays(router)).items():
            assert np.abs(g).max() > 1e-3, (loss, path)


def test_both_kernels_start_at_zero_and_noise_alone_routes():
    made = P.materialize(NoisyTopK(NoisyTopKConfig(), Dims(E, D)), 0)
    assert not any(np.any(v) for v in P.arrays(made).values())
    counts = routed(made, normal(5, 600, D), jax.random.key(6), True).decision.counts()
    np.testing.assert_allclose(counts / 600, K / E, atol=0.06)


def test_bias_from_outside_steers_choice_and_chance_alike(router):
    x, bias = normal(6, T, D), jnp.zeros(E).at[3].set(50.0)
    routing = routed(router, x, jax.random.key(7), True, inputs={"router_bias": bias})
    assert (routing.decision.experts[:, 0] == 3).all()
    assert float(routing.aux.terms["expected_load"][3]) == pytest.approx(T, rel=1e-3)


@pytest.mark.parametrize("settings", [dict(num_experts_per_tok=0), dict(noise_epsilon=0.0), dict(init_std=-1.0)])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=r"router\."):
        NoisyTopKConfig(**settings).validate("router")
    with pytest.raises(ConfigError, match="at most 4"):
        NoisyTopKConfig(num_experts_per_tok=5).validate_for(4, "router")
