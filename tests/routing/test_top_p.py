"""Top-P: sets, gates and bounds against a loop over tokens; the entropy loss; the controller of p."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import context, normal, softmax

from moe_zoo.core import param as P
from moe_zoo.core.aux import Stat
from moe_zoo.core.registry import ConfigError
from moe_zoo.losses.entropy_loss import EntropyLossConfig, entropy
from moe_zoo.routing.router import Dims
from moe_zoo.routing.top_p import TopP, TopPConfig, nucleus

T, D, E = 60, 5, 10
X = normal(0, T, D)


@functools.cache
def router(p: float, **settings) -> TopP:
    config = TopPConfig(top_p=p, init_std=0.4, **settings)
    return P.materialize(TopP(config, Dims(num_experts=E, hidden_size=D)), 0)


routed = jax.jit(lambda router, x, inputs: router(x, context(x.shape[0], inputs=inputs)))


def probabilities(made) -> np.ndarray:
    logits = np.asarray(X, np.float64) @ np.asarray(made.kernel[...], np.float64)
    return np.stack([softmax(z) for z in logits])


def loop(probs_E, p: float) -> dict[int, float]:
    """The authors' wording: all experts up to p, and the first beyond it."""
    kept, total = {}, 0.0
    for e in sorted(range(len(probs_E)), key=lambda e: (-probs_E[e], e)):
        kept[e] = probs_E[e]
        total += probs_E[e]
        if total > p:
            break
    return kept


@pytest.mark.parametrize("p", [0.0, 0.4, 0.85, 1.0])
def test_experts_and_gates_are_those_of_the_loop(p):
    made = router(p)
    decision = jax.device_get(routed(made, X, {}).decision)
    sizes = set()
    for t, probs_E in enumerate(probabilities(made)):
        expected = loop(probs_E, p)
        live = decision.experts[t] < E
        assert decision.experts[t][live].tolist() == list(expected), t
        np.testing.assert_allclose(decision.gates[t][live], list(expected.values()), rtol=2e-5)
        assert not decision.gates[t][~live].any()
        sizes.add(len(expected))
    assert sizes == {1} if p == 0 else sizes == {E} if p == 1 else len(sizes) > 2
    if p == 1.0:
        np.testing.assert_allclose(decision.gates.sum(-1), 1, rtol=1e-5)  # the dense mixture


def test_uniform_probabilities_need_exactly_the_static_bound_and_nobody_needs_more():
    for p, num_experts, bound in [(0.4, 16, 7), (0.29, 100, 30), (0.0, 8, 1), (1.0, 8, 8), (0.99, 8, 8)]:
        assert TopPConfig(top_p=p).max_active(num_experts) == bound
        # a little above p: whether 0.4 of a sum is at most 0.4 is a matter of its rounding
        uniform = jnp.full((1, num_experts), 1 / num_experts)
        assert int((nucleus(uniform, p + 1e-5, num_experts) < num_experts).sum()) == bound
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(E, 3.0), 2000).astype(np.float32)
    for p in (0.15, 0.4, 0.77):
        K = TopPConfig(top_p=p).max_active(E)
        wide, narrow = (np.asarray(nucleus(jnp.asarray(probs), p, k)) for k in (E, K))
        np.testing.assert_array_equal(wide[:, :K], narrow)
        assert (wide[:, K:] == E).all()


def test_a_larger_p_keeps_a_larger_set_that_holds_the_smaller():
    probs = jnp.asarray(probabilities(router(0.4)), jnp.float32)
    sets = [[set(row[row < E]) for row in np.asarray(nucleus(probs, p, E))] for p in np.linspace(0, 1, 9)]
    for smaller, larger in zip(sets, sets[1:]):
        assert all(a <= b for a, b in zip(smaller, larger))


def test_a_sure_token_keeps_one_expert_and_rounding_at_one_drops_none():
    sure = jnp.zeros((1, E)).at[0, 3].set(1.0)
    assert np.asarray(nucleus(sure, 0.4, 5)).tolist() == [[3, E, E, E, E]]
    beyond = jnp.full((1, E), 0.11)  # a sum past 1, as a float32 softmax may have
    assert int((nucleus(beyond, 1.0, E) < E).sum()) == E


def test_gradient_of_kept_gates_reaches_the_router_and_is_that_of_raw_probabilities():
    made = router(0.4)
    mix = normal(3, T, E)
    experts = routed(made, X, {}).decision.experts
    kept = (np.asarray(experts)[..., None] == np.arange(E)).any(1)

    def ours(kernel):
        decision = P.replace(made, {"kernel": kernel})(X, context(T)).decision
        return (decision.dense().gates * mix).sum()

    kernel = made.kernel[...]
    expected = jax.grad(lambda w: (jax.nn.softmax(X @ w) * kept * mix).sum())(kernel)
    np.testing.assert_allclose(jax.grad(ours)(kernel), expected, atol=1e-4)
    assert np.abs(expected).max() > 1


def test_bias_from_outside_steers_the_selection_only():
    routing = routed(router(0.4), X, {"router_bias": jnp.zeros(E).at[7].set(20.0)})
    np.testing.assert_array_equal(routing.decision.experts, np.where(np.arange(5) == 0, 7, E)[None].repeat(T, 0))
    np.testing.assert_array_equal(routing.decision.gates[:, 0], routing.probs[:, 7])


# -- the entropy loss -------------------------------------------------------------------------------------------------


def test_entropy_is_the_formula_between_zero_and_log_e():
    probs = probabilities(router(0.4))
    valid = np.arange(T) % 3 > 0
    by_token = np.array([-sum(p * np.log(p) for p in row) for row in probs])
    both = jax.jit(lambda q: (entropy(q), entropy(q, valid), entropy(q, jnp.zeros(T, bool))))
    got = both(jnp.asarray(probs, jnp.float32))
    np.testing.assert_allclose(got, [by_token.mean(), by_token[valid].mean(), 0], rtol=1e-5)
    assert float(entropy(jnp.full((3, E), 1 / E))) == pytest.approx(np.log(E), rel=1e-6)
    assert float(entropy(jnp.eye(E))) == 0


def test_entropy_gradient_sharpens_and_stays_finite_where_a_probability_vanished():
    loss = lambda z: entropy(jax.nn.softmax(z))
    z = jnp.asarray([[2.0, 1.0, -1.0, -400.0]])
    gradient = np.asarray(jax.grad(loss)(z))[0]
    p = softmax(np.asarray(z[0], np.float64))
    expected = [-q * (np.log(q) + -(p[:3] * np.log(p[:3])).sum()) if q > 1e-30 else 0.0 for q in p]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert gradient[0] < 0 < gradient[2]  # descent raises the largest


# -- the controller ---------------------------------------------------------------------------------------------------


def test_controller_brings_the_mean_to_its_target_and_stays_within_bounds():
    made = router(0.9, mean_experts=3.0, controller_rate=0.1)
    counted = jax.jit(lambda p: (nucleus(jnp.asarray(probabilities(made), jnp.float32), p, E) < E).sum() / T)
    p = made.top_p[...]
    for _ in range(60):
        stats = {"experts_per_token": Stat.mean(counted(p) * T, T)}
        p = P.replace(made, {**P.arrays(made), "top_p": p}).after_step(stats)["top_p"]
    assert float(counted(jnp.float32(0.9))) > 4 and float(counted(p)) == pytest.approx(3, abs=0.1)
    move = lambda now, mean: float(
        P.replace(made, {**P.arrays(made), "top_p": jnp.float32(now)}).after_step(
            {"experts_per_token": Stat.average(jnp.float32(mean))}
        )["top_p"]
    )
    assert move(0.5, 5.0) == pytest.approx(0.5 - 0.1 * 2 / E) and move(0.5, 3.0) == 0.5
    assert move(0.001, 10.0) == 0 and move(0.999, 1.0) == 1
    assert not router(0.4).after_step({}) and "top_p" not in P.arrays(router(0.4))


def test_experts_follow_the_buffer():
    made = router(0.4, controller_rate=0.1)
    size = lambda p: routed(P.replace(made, {**P.arrays(made), "top_p": jnp.float32(p)}), X, {}).decision.live().sum()
    assert int(size(0.0)) == T and int(size(1.0)) == T * E and T < int(size(0.4)) < T * E
    assert isinstance(P.flat(made)["top_p"], P.Buffer)


@pytest.mark.parametrize("settings, message", [
    (dict(top_p=1.1), r"router\.top_p.*\[0, 1\]"),
    (dict(top_p=-0.1), r"router\.top_p"),
    (dict(mean_experts=0.5), r"router\.mean_experts.*at least 1"),
    (dict(controller_rate=-1.0), r"router\.controller_rate"),
    (dict(controller_rate=0.1, top_p=0.5, max_top_p=0.4), r"router\.top_p.*max_top_p"),
    (dict(controller_rate=0.1, max_top_p=0.4, mean_experts=6.0), r"mean_experts.*at most 5 of num_experts=10"),
])  # fmt: skip
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        config = TopPConfig(**settings)
        config.validate("router")
        config.validate_for(E, "router")
    with pytest.raises(ConfigError, match=r"losses\.x\.coef"):
        EntropyLossConfig(coef=-1.0).validate("losses.x")
