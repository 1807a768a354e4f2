"""Sinkhorn: the plan against Megatron's loop in numpy, its marginals, what carries gradient, what sees the future."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import best, context, normal, sigmoid, softmax

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.routing.router import Dims
from moe_zoo.routing.sinkhorn import Sinkhorn, SinkhornConfig, log_plan

T, D, E = 48, 6, 4


def made(**settings) -> Sinkhorn:
    return P.materialize(Sinkhorn(SinkhornConfig(init_std=1.0, **settings), Dims(E, D)), 0)


route = jax.jit(lambda router, x, ctx: router(x, ctx))
plan = jax.jit(log_plan, static_argnums=2)


def loop(logits_TE, iterations):
    """Megatron's loop, a token and an expert at a time."""
    T, E = logits_TE.shape
    M, d0, d1 = np.exp(np.asarray(logits_TE, np.float64)), np.zeros(T), np.ones(E)
    for _ in range(iterations):
        for t in range(T):
            d0[t] = 1 / (T * sum(M[t, e] * d1[e] for e in range(E)))
        d1 = np.array([1 / (E * sum(M[t, e] * d0[t] for t in range(T))) for e in range(E)])
    return d0[:, None] * M * d1


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("train", [True, False])
def test_choices_and_gates_are_those_of_the_loop(K, train):
    router, x = made(num_experts_per_tok=K, iterations=5), normal(0, T, D)
    logits_TE = np.asarray(x, np.float64) @ np.asarray(router.kernel[...], np.float64)
    routing = route(router, x, context(T, train=train))
    chosen_by = loop(logits_TE, 5) if train else logits_TE
    moved = 0
    for t in range(T):
        scores = sigmoid(logits_TE[t]) if K == 1 else softmax(logits_TE[t])
        experts = best(chosen_by[t], K)
        np.testing.assert_array_equal(routing.decision.experts[t], experts)
        np.testing.assert_allclose(routing.decision.gates[t], scores[experts], rtol=1e-4)
        moved += experts != best(logits_TE[t], K)
    assert (moved > 3) == train, "the plan must move some tokens, and inference none"


def test_plan_has_even_experts_at_any_iteration_and_even_tokens_in_the_limit():
    logits_TE, everyone = 3 * normal(1, T, E), jnp.ones(T, bool)
    for iterations in (1, 3, 200):
        ours = np.exp(plan(logits_TE, everyone, iterations))
        np.testing.assert_allclose(ours, loop(logits_TE, iterations), rtol=1e-3)
        np.testing.assert_allclose(ours.sum(0), 1 / E, rtol=1e-4)
    np.testing.assert_allclose(ours.sum(1), 1 / T, rtol=1e-3)
    np.testing.assert_allclose(np.exp(plan(jnp.zeros((T, E)), everyone, 2)), 1 / (T * E), rtol=1e-5)
    extreme = plan(jnp.asarray([[500.0, 0, -500], [400, 300, 0], [0, 0, 0]]), jnp.ones(3, bool), 20)
    assert bool(jnp.isfinite(extreme).all())


def test_a_router_that_loves_one_expert_is_evened_out():
    router, x = made(iterations=20), normal(2, T, D)
    x = x + 2 * router.kernel[...][:, 0]  # without a plan most tokens agree
    counts = lambda train: np.asarray(route(router, x, context(T, train=train)).decision.counts())
    assert counts(False).max() > 2.5 * T / E and counts(True).max() < 1.5 * T / E


@pytest.mark.parametrize("group", ["batch", "sequence"])
def test_tokens_compete_within_their_group_and_only_in_training(group):
    router, x, B = made(group=group), normal(3, T, D), 3
    S = T // B
    first = np.arange(T) < S
    routed = lambda x, train: np.asarray(route(router, x, context(T, batch=B, train=train)).decision.experts)
    changed = x.at[S:].set(2.0)  # all of the other sequences
    assert (routed(x, True)[first] == routed(changed, True)[first]).all() == (group == "sequence")
    np.testing.assert_array_equal(routed(x, False)[first], routed(changed, False)[first])
    later = x.at[T - 3 :].set(-9 * router.kernel[...][:, 0])  # only the end of the last sequence
    earlier = (np.arange(T) >= T - S) & (np.arange(T) < T - 3)
    assert not (routed(x, True)[earlier] == routed(later, True)[earlier]).all()
    np.testing.assert_array_equal(routed(x, False)[earlier], routed(later, False)[earlier])


@pytest.mark.parametrize("group", ["batch", "sequence"])
def test_padding_takes_no_part(group):
    router, x, B = made(group=group), normal(4, T, D), 3
    valid = np.arange(T) % 16 < 11
    valid[32:] = group == "batch"  # a sequence of padding alone
    routed = lambda x: route(router, x, context(T, batch=B, train=True, valid=jnp.asarray(valid)))
    a, b = routed(x), routed(jnp.where(valid[:, None], x, 50.0))
    np.testing.assert_array_equal(a.decision.experts[valid], b.decision.experts[valid])
    rows = np.asarray(x)[valid]
    ctx = context(len(rows), batch=2 if group == "sequence" else 1, train=True)
    np.testing.assert_array_equal(a.decision.experts[valid], route(router, rows, ctx).decision.experts)
    error = a.aux.stats["sinkhorn_error"].value()
    assert float(error) == pytest.approx(float(b.aux.stats["sinkhorn_error"].value()), rel=1e-4) and error < 0.5


@pytest.mark.parametrize("K", [1, 2])
def test_gradient_is_that_of_the_gates_alone(K):
    router, x, ctx = made(num_experts_per_tok=K), normal(5, T, D), context(T, train=True)
    experts = route(router, x, ctx).decision.experts

    def through_router(kernel):
        return (P.replace(router, {"kernel": kernel})(x, ctx).decision.gates ** 2).sum()

    def gates_only(kernel):
        scores = jax.nn.sigmoid(x @ kernel) if K == 1 else jax.nn.softmax(x @ kernel)
        return (jnp.take_along_axis(scores, experts, 1) ** 2).sum()

    kernel = router.kernel[...]
    ours, expected = (jax.jit(jax.grad(f))(kernel) for f in (through_router, gates_only))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(ours).max()) > 0.1


def test_impossible_settings_are_refused():
    for change in ({"iterations": 0}, {"num_experts_per_tok": 0}, {"init_std": 0.0}):
        with pytest.raises(ConfigError, match=rf"router\.{next(iter(change))}"):
            dataclasses.replace(SinkhornConfig(), **change).validate("router")
    with pytest.raises(ConfigError, match="at most 4"):
        SinkhornConfig(num_experts_per_tok=5).validate_for(4, "router")
