"""AdaMoE: picks, gates and the balance loss against loops over tokens; without nulls it is top-k."""

import functools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from naive import context, normal, softmax, tiny_config

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.losses.load_balance import load_balance
from moe_zoo.losses.null_load_balance import NullLoadBalanceConfig, null_load_balance
from moe_zoo.routing.null_experts import NullExperts, NullExpertsConfig, true_softmax
from moe_zoo.routing.router import Dims
from moe_zoo.routing.top_k import TopK, TopKConfig

T, D, E, M, K = 60, 5, 4, 6, 3
X = normal(0, T, D)
VALID = np.arange(T) % 3 > 0


@functools.cache
def router(nulls: int = M, picks: int = K) -> NullExperts:
    config = NullExpertsConfig(num_null_experts=nulls, picks_per_token=picks, init_std=1.0)
    return P.materialize(NullExperts(config, Dims(num_experts=E, hidden_size=D)), 0)


routed = jax.jit(lambda router, x, ctx: router(x, ctx))


@functools.cache
def found():
    """(logits [T, E + M] in float64, what the router says)."""
    made = router()
    kernel = np.concatenate([np.asarray(w[...], np.float64) for w in (made.kernel, made.null_kernel)], 1)
    return np.asarray(X, np.float64) @ kernel, jax.device_get(routed(made, X, context(T)))


def test_picks_and_gates_are_those_of_the_loop():
    logits, routing = found()
    experts, gates = routing.decision.experts, routing.decision.gates
    sizes = set()
    for t in range(T):
        p = softmax(logits[t])
        picks = naive.best(p, K)
        true = [e for e in picks if e < E]
        assert experts[t].tolist() == [e if e < E else E for e in picks]
        np.testing.assert_allclose(gates[t][experts[t] < E], [p[e] / sum(p[true]) for e in true], rtol=5e-5)
        assert not gates[t][experts[t] == E].any()
        assert gates[t].sum() == pytest.approx(1 if true else 0, abs=1e-6)
        sizes.add(len(true))
    assert sizes == {0, 1, 2}
    none = (experts == E).all(1)
    assert float(routing.aux.stats["skipped_fraction"].value()) == pytest.approx(none.mean())
    padded = routed(router(), X, context(T, valid=VALID)).aux.stats["skipped_fraction"]
    assert float(padded.value()) == pytest.approx(none[VALID].mean())


def test_without_nulls_it_is_top_k():
    made = router(0, 2)
    top_k = P.materialize(TopK(TopKConfig(num_experts_per_tok=2), Dims(num_experts=E, hidden_size=D)), 0)
    ours, theirs = (routed(r, X, context(T)) for r in (made, P.replace(top_k, P.arrays(made))))
    np.testing.assert_array_equal(ours.decision.experts, theirs.decision.experts)
    np.testing.assert_allclose(ours.decision.gates, theirs.decision.gates, rtol=1e-5)
    np.testing.assert_allclose(ours.probs, theirs.probs, rtol=1e-6)
    counts = ours.decision.counts()
    assert float(null_load_balance(ours.probs, counts, 2 * T)) == pytest.approx(
        float(load_balance(theirs.probs, counts)), rel=1e-6
    )


def test_nulls_that_are_copies_lose_their_ties():
    """A converted router begins with as many experts as it had: picks alternate between an expert and its copy."""
    made = router(E, 3)
    copied = P.replace(made, {"kernel": made.kernel[...], "null_kernel": made.kernel[...]})
    decision = routed(copied, X, context(T)).decision
    np.testing.assert_array_equal(decision.live().sum(-1), 2)
    best, _ = naive.top_k(np.asarray(X, np.float64) @ np.asarray(made.kernel[...], np.float64), 2)
    np.testing.assert_array_equal(np.asarray(decision.experts)[:, [0, 2]], best)


def test_gates_survive_probabilities_that_underflow_and_so_do_gradients():
    logits = jnp.asarray([[300.0, -300.0, -301.0], [300.0, 200.0, 100.0]])
    true = jnp.asarray([[False, True, True], [False, False, False]])
    both = jax.value_and_grad(lambda z: (true_softmax(z, true)[:, 1] ** 2).sum())
    np.testing.assert_allclose(true_softmax(logits, true), [[0, *softmax(np.array([1.0, 0.0]))], [0, 0, 0]], rtol=1e-6)
    value, gradient = both(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all() and not gradient[1].any() and gradient[0, 1] > 0.1


def test_task_gradient_reaches_true_experts_only_through_gates_and_nulls_through_the_loss():
    made = router()
    mix = normal(4, T, E)
    _, routing = found()

    def task(values):
        return (P.replace(made, values)(X, context(T)).decision.dense().gates * mix).sum()

    def balance(values):
        routing = P.replace(made, values)(X, context(T))
        return null_load_balance(routing.probs, routing.decision.counts(), K * T)

    by_task, by_balance = jax.jit(lambda v: (jax.grad(task)(v), jax.grad(balance)(v)))(P.arrays(made))
    assert not by_task["null_kernel"].any() and np.abs(by_task["kernel"]).max() > 0.1
    assert all(np.abs(g).max() > 1e-3 for g in by_balance.values())
    several = (np.asarray(routing.decision.experts) < E).sum(1) > 1  # with one expert the gate is 1 whatever x
    slope = jax.grad(lambda x: (made(x, context(T)).decision.dense().gates * mix).sum())(X)
    assert np.abs(slope[several]).max(1).min() > 0 and not slope[~several].any()


def test_bias_from_outside_steers_true_experts_and_the_selection_only():
    routing = routed(router(), X, context(T, inputs={"router_bias": jnp.full(E, 50.0)}))
    assert (routing.decision.experts < E).all()
    np.testing.assert_array_equal(routing.probs, found()[1].probs)


# -- the balance loss -------------------------------------------------------------------------------------------------


def by_loop(logits, experts, valid):
    """Equation 6 with f as a share: nulls share one load."""
    tokens = [t for t in range(T) if valid[t]]
    f, mean = np.zeros(E + M), np.zeros(E + M)
    for t in tokens:
        mean += softmax(logits[t]) / len(tokens)
        for e in experts[t]:
            if e < E:
                f[e] += 1 / (K * len(tokens))
            else:
                f[E:] += 1 / (K * len(tokens)) / M
    return (E + M) * (f * mean).sum()


@pytest.mark.parametrize("valid", [None, VALID], ids=["all", "padding"])
def test_loss_is_the_formula(valid):
    logits, routing = found()
    choice, picks = routing.decision.masked(valid), K * (T if valid is None else valid.sum())
    got = null_load_balance(routing.probs, choice.counts(), picks, valid)
    expected = by_loop(logits, routing.decision.experts, np.ones(T, bool) if valid is None else valid)
    assert float(got) == pytest.approx(expected, rel=1e-5) and abs(expected - 1) > 0.02
    # which of the nulls has the mass does not matter, which of the experts does
    moved = lambda order: float(null_load_balance(routing.probs[:, order], choice.counts(), picks, valid))
    assert moved([0, 1, 2, 3, 9, 8, 4, 5, 7, 6]) == pytest.approx(expected, rel=1e-5)
    assert moved([3, 0, 1, 2, 4, 5, 6, 7, 8, 9]) != pytest.approx(expected, rel=1e-3)


def test_loss_is_one_at_balance_and_zero_without_tokens():
    uniform = jnp.full((T, E + M), 1 / (E + M))
    assert float(null_load_balance(uniform, jnp.asarray([9, 0, 2, 1]), K * T)) == pytest.approx(1, rel=1e-6)
    assert float(null_load_balance(uniform, jnp.zeros(E, int), 0, jnp.zeros(T, bool))) == 0


@pytest.mark.parametrize("favoured", ["kernel", "null_kernel"])
def test_descent_on_the_loss_alone_brings_the_load_to_balance(favoured):
    """k E / (E + M) true experts per token and all alike, from too many and from too few."""
    made, x = router(), X.at[:, 0].set(1.0)  # the constant lets the router prefer an expert for all tokens

    @jax.jit
    def step(values):
        def loss(values):
            routing = P.replace(made, values)(x, context(T))
            counts = routing.decision.counts()
            return null_load_balance(routing.probs, counts, K * T), counts / T

        gradient, load = jax.grad(loss, has_aux=True)(values)
        return jax.tree.map(lambda v, g: v - g, values, gradient), load

    values = P.arrays(made)
    values[favoured], loads = values[favoured].at[0].add(2.0), []
    for _ in range(200):
        values, load = step(values)
        loads.append(np.asarray(load))
    wrong = loads[0].sum() - K * E / (E + M)
    assert wrong > 0.5 if favoured == "kernel" else wrong < -0.5
    np.testing.assert_allclose(np.mean(loads[-50:], 0), K / (E + M), atol=0.03)


def test_losses_that_know_no_nulls_are_refused_by_name():
    given = {"name": "null_experts", "num_null_experts": 2}
    with pytest.raises(ConfigError, match="load_balance: needs the router's probs, and router 'null_experts' has none"):
        tiny_config(router=given, losses={"load_balance": {}})
    with pytest.raises(ConfigError, match="needs the router's null_probs, and router 'top_k' has none"):
        tiny_config(losses={"null_load_balance": {}})
    tiny_config(router=given, losses={"null_load_balance": {}, "z_loss": {}})


@pytest.mark.parametrize("settings, message", [
    (dict(num_null_experts=-1), r"router\.num_null_experts"),
    (dict(picks_per_token=0), r"router\.picks_per_token"),
    (dict(num_null_experts=1, picks_per_token=6), r"6 picks of num_experts=4 and num_null_experts=1; at most 5"),
])  # fmt: skip
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        config = NullExpertsConfig(**settings)
        config.validate("router")
        config.validate_for(E, "router")
    with pytest.raises(ConfigError, match=r"losses\.x\.coef"):
        NullLoadBalanceConfig(coef=-1.0).validate("losses.x")
