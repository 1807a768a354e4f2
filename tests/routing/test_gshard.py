"""GShard's gating: a loop in numpy, the random second expert, and the order in which places are given."""

import functools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from naive import context, normal

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.dispatch.capacity import Capacity, CapacityConfig
from moe_zoo.losses.load_balance import LoadBalance, LoadBalanceConfig
from moe_zoo.routing.gshard import GShard, GShardConfig, NllbConfig
from moe_zoo.routing.router import Dims

T, D, E = 48, 5, 6


@pytest.fixture(scope="module")
def gshard():
    return made()


def made(**settings):
    return P.materialize(GShard(GShardConfig(init_std=0.5, **settings), Dims(E, D)), 0)


@functools.partial(jax.jit, static_argnums=3)
def routed(router, x, key, train):
    return router(x, context(x.shape[0], train=train, key=key))


def top_2(router, x):
    logits = np.asarray(x, np.float64) @ np.asarray(router.kernel[...], np.float64)
    return naive.top_k(logits, 2)


def test_without_training_it_is_top_2_renormalised(gshard):
    x = normal(0, T, D)
    decision = routed(gshard, x, jax.random.key(0), False).decision
    experts, gates = top_2(gshard, x)
    np.testing.assert_array_equal(decision.experts, experts)
    np.testing.assert_allclose(decision.gates, gates, rtol=1e-4)


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_second_expert_is_kept_in_proportion_to_its_gate(threshold):
    router, n = made(second_threshold=threshold), 4000
    x = jnp.tile(normal(1, 3, D), (n, 1))
    decision = jax.device_get(routed(router, x, jax.random.key(1), True).decision)
    experts, gates = top_2(router, x[:3])
    kept = decision.experts[:, 1] < E
    for t in range(3):
        assert kept[t::3].mean() == pytest.approx(min(1, gates[t, 1] / threshold), abs=0.03)
    np.testing.assert_array_equal(decision.experts[:, 0], np.tile(experts[:, 0], n))
    np.testing.assert_array_equal(decision.experts[kept, 1], np.tile(experts[:, 1], n)[kept])
    # the gate of what was skipped is nobody's
    np.testing.assert_allclose(decision.gates[:, 0], np.tile(gates[:, 0], n), rtol=1e-4)
    np.testing.assert_allclose(decision.gates[:, 1], np.where(kept, np.tile(gates[:, 1], n), 0), rtol=1e-4)


def test_a_threshold_of_zero_always_keeps_it():
    decision = routed(made(second_threshold=0.0), normal(2, T, D), jax.random.key(2), True).decision
    assert bool(decision.live().all())


def test_loss_counts_first_choices_before_any_drop(gshard):
    x = normal(3, T, D)
    routing = routed(gshard, x, jax.random.key(3), True)
    (experts, _), probs = top_2(gshard, x), np.asarray(routing.probs, np.float64)
    loss = LoadBalance(LoadBalanceConfig(choices="first"))(routing, context(T))
    count, mean = np.bincount(experts[:, 0], minlength=E), probs.mean(0)
    assert float(loss) == pytest.approx(E**2 * sum(count[e] / T * mean[e] for e in range(E)) / E, rel=1e-5)


def test_skipped_second_choices_take_no_place(gshard):
    """All first choices in token order, then the second ones that were kept."""
    x, C = normal(4, T, D), 9
    decision = routed(gshard, x, jax.random.key(4), True).decision
    plan = Capacity(CapacityConfig(C * E / (2 * T))).plan(decision, context(T, train=True))
    taken, kept = [0] * E, np.zeros((T, 2), bool)
    for k in range(2):
        for t, e in enumerate(np.asarray(decision.experts)[:, k]):
            if e < E:
                kept[t, k] = taken[e] < C
                taken[e] += 1
    assert plan.num_rows == E * C
    np.testing.assert_array_equal(plan.slot < plan.num_rows, kept)
    assert 0 < (~kept & (np.asarray(decision.experts) < E)).sum()


def test_gradient_reaches_the_router_through_either_gate(gshard):
    x = normal(5, T, D)
    ctx = context(T, train=True, key=jax.random.key(5))
    loss = lambda kernel, k: P.replace(gshard, {"kernel": kernel})(x, ctx).decision.gates[:, k].sum()
    for k in range(2):
        assert np.abs(jax.jit(jax.grad(loss), static_argnums=1)(gshard.kernel[...], k)).max() > 1e-2


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("normalize_first", [False, True])
def test_places_that_the_router_gives_out(prioritized, normalize_first):
    """For a sixth of the tokens each, as NLLB: first choices, then second ones, in order or the surest first."""
    nllb = NllbConfig(7, 1 / 6, prioritized, normalize_first, output_masking=0.2)
    router, x = made(second_threshold=0.0, nllb=nllb), normal(6, T, D) + 0.5  # experts that many want
    valid = np.arange(T) % 5 > 0
    decision = placed(router, x, valid)
    (experts, gates), C = top_2(router, x), T // 6
    probs = np.array([naive.softmax(row) for row in np.asarray(x, np.float64) @ np.asarray(router.kernel[...])])
    order = sorted(np.flatnonzero(valid), key=lambda t: -probs[t].max() if prioritized else 0)
    taken, kept = [0] * E, np.zeros((T, 2), bool)
    for k in range(2):
        for t in order:
            kept[t, k] = taken[experts[t, k]] < C
            taken[experts[t, k]] += 1
    assert 0 < (valid[:, None] & ~kept).sum() and (kept[:, 1] & ~kept[:, 0]).any()
    np.testing.assert_array_equal(decision.experts, np.where(kept, experts, E))
    expected = np.where(kept, gates, 0)
    if not normalize_first:
        expected = expected / np.maximum(expected.sum(1, keepdims=True), 1e-30)
    np.testing.assert_allclose(decision.gates, 0.8 * expected, rtol=1e-4, atol=1e-7)
    assert not router.causal and made(nllb=NllbConfig(7)).causal


@jax.jit
def placed(router, x, valid):
    return router(x, context(T, valid=valid)).decision


def test_in_training_places_are_counted_and_what_comes_back_is_masked_by_token():
    n = 3000
    router = made(second_threshold=0.0, nllb=NllbConfig(n // 5, output_masking=0.25, sampled_second=True))
    x = jnp.tile(normal(1, 1, D), (n, 1))
    decision = jax.device_get(routed(router, x, jax.random.key(1), True).decision)
    counts = np.bincount(decision.experts.reshape(-1), minlength=E + 1)[:E]
    assert counts.max() == n // 5  # and more wanted the first
    masked = (decision.gates == 0).all(1) & (decision.experts < E).any(1)
    assert masked.sum() / (decision.experts < E).any(1).sum() == pytest.approx(0.25, abs=0.03)
    # all others as second in proportion to their probability
    probs = naive.softmax(np.asarray(x[0], np.float64) @ np.asarray(router.kernel[...], np.float64))
    seconds = probs.copy()
    seconds[probs.argmax()] = 0
    drawn = np.bincount(routed(made(second_threshold=0.0, nllb=NllbConfig(sampled_second=True)), x, jax.random.key(1),
                               True).decision.experts[:, 1], minlength=E) / n  # fmt: skip
    np.testing.assert_allclose(drawn, seconds / seconds.sum(), atol=0.03)


@pytest.mark.parametrize("settings", [dict(second_threshold=-0.1), dict(init_std=0.0)])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=r"router\."):
        GShardConfig(**settings).validate("router")


@pytest.mark.parametrize("settings", [dict(expert_capacity=-1), dict(output_masking=1.0)])
def test_impossible_settings_of_nllb_are_refused(settings):
    with pytest.raises(ConfigError, match=r"router\.nllb\."):
        NllbConfig(**settings).validate("router.nllb")
