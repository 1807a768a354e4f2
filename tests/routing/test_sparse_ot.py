"""Sparsity-constrained transport: projection, dual and plan against numpy, what is exact at any number of steps."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import context, normal, softmax

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.routing.router import Dims
from moe_zoo.routing.sparse_ot import SparseOT, SparseOTConfig, sparse_simplex, transport_plan

B, S, D, E = 2, 12, 6, 4
T = B * S
plan = jax.jit(transport_plan, static_argnums=(2, 3, 4, 5))
project = jax.jit(sparse_simplex, static_argnums=1)
route = jax.jit(lambda router, x, ctx: router(x, ctx))


def made(**settings) -> SparseOT:
    return P.materialize(SparseOT(SparseOTConfig(init_std=1.0, **settings), Dims(E, D)), 0)


def simplex(v):
    """The threshold by bisection, not by sorting."""
    low, high = v.min() - 1, v.max()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(v - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(v - low, 0)


def loop_project(v, k):
    p, best = np.zeros(len(v)), np.argsort(-v, kind="stable")[:k]
    p[best] = simplex(v[best])
    return p


def loop_plan(sim_ES, k, steps, rate=1e-2, gamma=1.0):
    """(Q, alpha): Adam by hand, in float64, one expert at a time."""
    E, S = sim_ES.shape
    alpha, m, v = np.zeros(S), np.zeros(S), np.zeros(S)
    Q = lambda: np.stack([S / E * loop_project((alpha + sim_ES[e]) / (gamma * S / E), k) for e in range(E)])
    for i in range(1, steps + 1):
        g = Q().sum(0) - 1
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        alpha = alpha - rate * (m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.999**i)) + 1e-8)
    return Q(), alpha


def similarity(seed, E=E, S=S):
    return jax.nn.softmax(2 * normal(seed, E, S), axis=0)


def test_projection_is_the_nearest_of_all_sparse_points():
    v = np.asarray(normal(0, 5, 6), np.float64)
    for k in (1, 2, 4, 6):
        ours = np.asarray(project(jnp.asarray(v), k))
        assert ((ours > 0).sum(1) <= k).all() and (ours >= 0).all()
        np.testing.assert_allclose(ours.sum(1), 1, rtol=1e-6)
        for row, p in zip(v, ours):
            options = []
            for chosen in itertools.combinations(range(6), k):  # every support, its nearest point
                q = np.zeros(6)
                q[list(chosen)] = simplex(row[list(chosen)])
                options.append(q)
            nearest = min(options, key=lambda q, row=row: ((q - row) ** 2).sum())
            np.testing.assert_allclose(p, nearest, atol=1e-6)


@pytest.mark.parametrize("k, steps", [(3, 0), (3, 20), (6, 20), (S, 60)])
def test_plan_equals_the_loop_and_is_exact_for_experts(k, steps):
    sim_ES, everyone = similarity(1), jnp.ones(S, bool)
    ours = np.asarray(plan(sim_ES, everyone, k, steps, 1e-2, 1.0))
    np.testing.assert_allclose(ours, loop_plan(np.asarray(sim_ES, np.float64), k, steps)[0], atol=2e-4)
    np.testing.assert_allclose(ours.sum(1), S / E, rtol=1e-5)
    assert ((ours > 0).sum(1) <= k).all()


def test_enough_steps_reach_the_optimum_where_k_is_all():
    """Plain quadratic transport, by its optimality conditions: S + alpha - gamma Q is one constant per expert where
    Q > 0 and no larger elsewhere, and tokens sum to 1.
    """
    sim_ES, everyone, gamma = similarity(2), jnp.ones(S, bool), 0.1
    error = lambda n: float(np.abs(plan(sim_ES, everyone, S, n, 1e-2, gamma).sum(0) - 1).max())
    assert error(0) > 0.2 and error(400) < 1e-3
    Q, alpha = loop_plan(np.asarray(sim_ES, np.float64), S, 3000, rate=1e-3, gamma=gamma)
    np.testing.assert_allclose(plan(sim_ES, everyone, S, 400, 1e-2, gamma), Q, atol=2e-3)
    np.testing.assert_allclose(Q.sum(0), 1, atol=1e-4)
    slack_ES = alpha + np.asarray(sim_ES, np.float64) - gamma * Q
    for slack_S, on_S in zip(slack_ES, Q > 0):
        assert np.ptp(slack_S[on_S]) < 1e-9 and slack_S.max() <= slack_S[on_S].max() + 1e-9
    assert (Q == 0).any()


def test_gradient_of_the_dual_is_what_a_step_follows():
    """Finite differences of F(alpha) = sum_e M(alpha + S_e) - sum alpha against the plan's token sums minus 1."""
    sim_ES, k, b = np.asarray(similarity(3), np.float64), 4, S / E

    def dual(alpha):
        total = -alpha.sum()
        for e in range(E):
            p = loop_project((alpha + sim_ES[e]) / b, k)
            total += b * (p @ (alpha + sim_ES[e]) - b / 2 * (p @ p))
        return total

    numeric = [(dual(1e-6 * np.eye(S)[t]) - dual(-1e-6 * np.eye(S)[t])) / 2e-6 for t in range(S)]
    ours = np.asarray(plan(similarity(3), jnp.ones(S, bool), k, 0, 1e-2, 1.0)).sum(0) - 1
    np.testing.assert_allclose(ours, numeric, atol=1e-5)


@pytest.mark.parametrize("group", ["sequence", "batch"])
@pytest.mark.parametrize("fill", [False, True])
def test_experts_take_the_tokens_of_the_plan(group, fill):
    router, x = made(group=group, fill=fill, gamma=0.2), normal(4, T, D)
    routing = route(router, x, context(T, batch=B))
    G, n = (B, S) if group == "sequence" else (1, T)
    k = 2 * n // E
    logits = (np.asarray(x, np.float64) @ np.asarray(router.kernel[...], np.float64)).reshape(G, n, E)
    short = 0
    for g in range(G):
        sim_ES = np.stack([softmax(z) for z in logits[g]], 1)
        Q, _ = loop_plan(sim_ES, k, 20, gamma=0.2)
        for e in range(E):
            expected = [t for t in np.argsort(-Q[e], kind="stable")[:k] if fill or Q[e, t] > 0]
            tokens, gates = np.asarray(routing.decision.tokens[g, e]), np.asarray(routing.decision.gates[g, e])
            assert set(tokens[tokens < n]) == set(expected)
            assert (gates[tokens == n] == 0).all()
            np.testing.assert_allclose(gates[tokens < n], sim_ES[e, tokens[tokens < n]], rtol=1e-4)
            short += k - (Q[e] > 0).sum()
    assert short > 2, "some experts must want fewer than k tokens, or `fill` is not tried"


def test_padding_takes_no_part_and_a_group_of_padding_is_empty():
    router, x = made(capacity_factor=4.0), normal(5, T, D)
    valid = np.arange(T) % S < 9
    valid[S:] = False
    routed = lambda x: route(router, x, context(T, batch=B, valid=jnp.asarray(valid)))
    a, b = routed(x), routed(jnp.where(valid[:, None], x, 50.0))
    np.testing.assert_array_equal(a.decision.tokens, b.decision.tokens)
    np.testing.assert_allclose(a.decision.gates, b.decision.gates, rtol=1e-6)
    tokens = np.asarray(a.decision.tokens)
    assert set(tokens[0][tokens[0] < S]) <= set(range(9)) and (tokens[1] == S).all()
    # nine tokens alone, k of all: the same plan
    alone = np.asarray(route(router, x[:9], context(9, batch=1)).decision.tokens)
    for ours, theirs in zip(tokens[0], alone[0]):
        assert set(ours[ours < S]) == set(theirs[theirs < 9])


def test_gradient_is_that_of_the_softmax_at_the_chosen_pairs():
    router, x, ctx = made(), normal(6, T, D), context(T, batch=B)
    decision = route(router, x, ctx).decision
    taken = np.zeros((B, E, S + 1))
    np.put_along_axis(taken, np.asarray(decision.tokens), 1.0, axis=2)

    def through_router(kernel):
        return (P.replace(router, {"kernel": kernel})(x, ctx).decision.gates ** 2).sum()

    def chosen_only(kernel):
        probs_BES = jax.nn.softmax(x @ kernel).reshape(B, S, E).swapaxes(1, 2)
        return ((probs_BES * taken[:, :, :S]) ** 2).sum()

    ours, expected = (jax.jit(jax.grad(f))(router.kernel[...]) for f in (through_router, chosen_only))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(ours).max()) > 0.1


def test_impossible_settings_are_refused():
    for name, value in dict(steps=-1, gamma=0.0, learning_rate=0.0, capacity_factor=0.0, init_std=0.0).items():
        with pytest.raises(ConfigError, match=rf"router\.{name}"):
            SparseOTConfig(**{name: value}).validate("router")
