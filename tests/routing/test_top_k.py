"""Top-k routing against a loop over tokens, in every convention, and the identities between conventions."""

import dataclasses

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from naive import context, normal

from moe_zoo.core import param as P
from moe_zoo.core.aux import Stat
from moe_zoo.core.registry import ConfigError
from moe_zoo.routing.router import Dims, linear_logits
from moe_zoo.routing.top_k import TopK, TopKConfig, select

T, D, E, K = 13, 6, 12, 4
BIAS = np.random.default_rng(9).normal(size=E) * 0.4
GROUPS = {"n_group": 4, "topk_group": 2}


def router(E=E, kernel_scale=1.0, bias=None, **settings):
    config = TopKConfig(**{"num_experts_per_tok": K, "init_std": kernel_scale, **settings})
    config.validate("router")
    config.validate_for(E, "router")
    made = P.materialize(TopK(config, Dims(num_experts=E, hidden_size=D)), 0)
    if bias is not None:
        made = P.replace(made, {**P.arrays(made), "correction": jnp.asarray(bias, jnp.float32)})
    return made


@jax.jit
def routed(made, x, fields):
    return made(x, context(x.shape[0], **fields))


def route(made, x, **fields):
    return jax.device_get(routed(made, x, fields))


def logits_of(made, x):
    values = {n: np.asarray(a, np.float64) for n, a in P.arrays(made).items()}
    return np.asarray(x, np.float64) @ values["kernel"] + values.get("bias", 0)


CONVENTIONS = {
    "Qwen3: softmax, renormalised": (dict(), dict()),
    "OLMoE: softmax, raw": (dict(norm_topk_prob=False), dict(norm=False)),
    "Granite: softmax of the top": (dict(score_function="softmax_of_top_k"), dict(score="softmax_of_top_k")),
    "sigmoid, raw": (dict(score_function="sigmoid", norm_topk_prob=False), dict(score="sigmoid", norm=False)),
    "sigmoid, bias, scaled": (
        dict(score_function="sigmoid", correction_bias=True, routed_scaling_factor=2.5),
        dict(score="sigmoid", bias=BIAS, scale=2.5),
    ),
    "DeepSeek-V2: groups by their best": (
        dict(norm_topk_prob=False, routed_scaling_factor=16.0, group_score="max", **GROUPS),
        dict(norm=False, scale=16.0, group_score="max", **GROUPS),
    ),
    "DeepSeek-V3: groups by their two best, bias": (
        dict(score_function="sigmoid", correction_bias=True, routed_scaling_factor=2.5, **GROUPS),
        dict(score="sigmoid", bias=BIAS, scale=2.5, **GROUPS),
    ),
    "negative biased scores in groups": (
        dict(score_function="sigmoid", correction_bias=True, **GROUPS),
        dict(score="sigmoid", bias=BIAS - 3, **GROUPS),
    ),
    "groups of one expert": (dict(n_group=12, topk_group=5), dict(n_group=12, topk_group=5)),
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_experts_and_gates_are_those_of_a_loop_over_tokens(name):
    ours, theirs = CONVENTIONS[name]
    made, x = router(bias=theirs.get("bias"), **ours), normal(1, T, D)
    experts, gates = naive.top_k(logits_of(made, x), K, **theirs)
    routing = route(made, x)
    np.testing.assert_array_equal(routing.decision.experts, experts)
    np.testing.assert_allclose(routing.decision.gates, gates, rtol=2e-5)
    assert routing.decision.num_experts == E and routing.decision.experts.dtype == jnp.int32
    np.testing.assert_allclose(routing.logits, logits_of(made, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score, unit", [("softmax", True), ("sigmoid", True), ("softmax_of_top_k", True)])
def test_reported_probabilities_are_a_distribution_before_any_bias(score, unit):
    x = normal(2, T, D)
    plain, biased = router(score_function=score), router(score_function=score, correction_bias=True, bias=BIAS)
    probs = route(plain, x).probs
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(route(biased, x).probs, probs)
    z = logits_of(plain, x)
    s = naive.sigmoid(z) if score == "sigmoid" else np.exp(z)
    np.testing.assert_allclose(probs, s / s.sum(-1, keepdims=True), rtol=1e-4)


def test_mixtral_equals_softmax_then_top_k_then_renormalise():
    x = normal(3, T, D)
    a, b = route(router(score_function="softmax_of_top_k"), x).decision, route(router(), x).decision
    np.testing.assert_array_equal(a.experts, b.experts)
    np.testing.assert_allclose(a.gates, b.gates, rtol=1e-5)


def test_linear_bias_moves_the_logits_and_with_them_the_gates():
    made, x = router(linear_bias=True, score_function="softmax_of_top_k"), normal(4, T, D)
    moved = P.replace(made, {**P.arrays(made), "bias": jnp.asarray(BIAS * 5, jnp.float32)})
    experts, gates = naive.top_k(logits_of(moved, x), K, score="softmax_of_top_k")
    assert (experts != naive.top_k(logits_of(made, x), K)[0]).any()
    decision = route(moved, x).decision
    np.testing.assert_array_equal(decision.experts, experts)
    np.testing.assert_allclose(decision.gates, gates, rtol=2e-5)


def test_a_constant_added_to_the_bias_changes_nothing():
    x, settings = normal(5, T, D), dict(score_function="sigmoid", correction_bias=True)
    a, b = (route(router(bias=bias, **settings), x).decision for bias in (BIAS, BIAS + 7))
    np.testing.assert_array_equal(a.experts, b.experts)
    np.testing.assert_array_equal(a.gates, b.gates)


def test_bias_steers_the_selection_but_never_the_gates():
    x = normal(6, T, D)
    bias = np.zeros(E)
    bias[[2, 5, 7, 11]] = 50
    made = router(bias=bias, score_function="sigmoid", norm_topk_prob=False, correction_bias=True)
    decision = route(made, x).decision
    assert (np.sort(decision.experts, -1) == [2, 5, 7, 11]).all()
    s = naive.sigmoid(logits_of(made, x))
    np.testing.assert_allclose(decision.gates, np.take_along_axis(s, np.asarray(decision.experts), -1), rtol=2e-5)


def test_bias_from_outside_adds_to_the_own_one():
    x, settings = normal(7, T, D), dict(score_function="sigmoid", correction_bias=True)
    inputs = {"router_bias": jnp.asarray(BIAS, jnp.float32)}
    outside = route(router(bias=BIAS, **settings), x, inputs=inputs).decision
    inside = route(router(bias=2 * BIAS, **settings), x).decision
    np.testing.assert_array_equal(outside.experts, inside.experts)
    assert (outside.experts != route(router(bias=BIAS, **settings), x).decision.experts).any()
    no_buffer = route(router(score_function="sigmoid"), x, inputs=inputs).decision
    np.testing.assert_array_equal(no_buffer.experts, route(router(bias=BIAS, **settings), x).decision.experts)


def test_zero_bias_in_one_group_is_plain_top_k():
    x = normal(8, T, D)
    a = route(router(score_function="sigmoid"), x).decision
    b = route(router(score_function="sigmoid", correction_bias=True, bias=np.zeros(E)), x).decision
    np.testing.assert_array_equal(a.experts, b.experts)
    np.testing.assert_array_equal(a.gates, b.gates)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softmax_of_top_k"])
@pytest.mark.parametrize("E, K, T", [(4, 4, 5), (1, 1, 3), (4, 2, 1)])
def test_edge_sizes_match_the_loop(score, E, K, T):
    made, x = router(E, num_experts_per_tok=K, score_function=score), normal(9, T, D)
    experts, gates = naive.top_k(logits_of(made, x), K, score=score)
    decision = route(made, x).decision
    np.testing.assert_array_equal(decision.experts, experts)
    np.testing.assert_allclose(decision.gates, gates, rtol=2e-5)


def test_ties_go_to_the_lower_expert():
    np.testing.assert_array_equal(jax.jit(select, static_argnums=1)(jnp.zeros((2, 5)), 3), [[0, 1, 2], [0, 1, 2]])


def test_sigmoid_scores_that_all_underflow_give_finite_gates():
    made = router(score_function="sigmoid", linear_bias=True)
    made = P.replace(made, {**P.arrays(made), "bias": jnp.full(E, -200.0)})
    assert np.isfinite(route(made, normal(10, T, D)).decision.gates).all()


def test_renaming_experts_renames_the_choices():
    made, x, order = router(norm_topk_prob=False), normal(11, T, D), np.random.default_rng(0).permutation(E)
    moved = P.replace(made, {"kernel": jnp.asarray(np.asarray(made.kernel[...])[:, order])})
    a, b = route(made, x).decision, route(moved, x).decision
    np.testing.assert_array_equal(a.experts, order[np.asarray(b.experts)])
    np.testing.assert_allclose(a.gates, b.gates, rtol=1e-6)


def test_low_precision_tokens_are_routed_in_float32():
    made, x = router(), normal(12, T, D).astype(jnp.bfloat16)
    low, wide = route(made, x), route(made, x.astype(jnp.float32))
    assert low.decision.gates.dtype == low.logits.dtype == low.probs.dtype == jnp.float32
    np.testing.assert_array_equal(low.decision.gates, wide.decision.gates)
    np.testing.assert_array_equal(low.decision.experts, wide.decision.experts)
    kernel = normal(13, D, E).astype(jnp.bfloat16)
    both = jax.jit(lambda x, w: (linear_logits(x, w), linear_logits(x.astype(jnp.float32), w.astype(jnp.float32))))
    np.testing.assert_array_equal(*both(x, kernel))


@pytest.mark.parametrize("loads", [[9, 3, 3, 1], [4, 4, 4, 4], [0, 0, 0, 8]])
def test_after_step_moves_the_bias_by_exactly_u_towards_the_mean_load(loads):
    made = router(4, num_experts_per_tok=2, bias=[0.5, 0.0, -0.25, 1.0], correction_bias=True, bias_update_rate=2**-10)
    new = made.after_step({"load": Stat.sum(jnp.asarray(loads))})["correction"]
    step = 2**-10 * np.sign(np.mean(loads) - np.array(loads))
    np.testing.assert_array_equal(new, np.float32([0.5, 0.0, -0.25, 1.0]) + np.float32(step))


def test_after_step_changes_nothing_unless_asked():
    stats = {"load": Stat.sum(jnp.arange(4))}
    assert router(4, num_experts_per_tok=2).after_step(stats) == {}
    assert router(4, num_experts_per_tok=2, correction_bias=True).after_step(stats) == {}


@pytest.mark.parametrize(
    "settings, reached",
    [
        (dict(), True),
        (dict(norm_topk_prob=False), True),
        (dict(score_function="softmax_of_top_k"), True),
        (dict(score_function="sigmoid", correction_bias=True, **GROUPS), True),
        (dict(num_experts_per_tok=1, norm_topk_prob=False), True),
        (dict(num_experts_per_tok=1), False),
        (dict(num_experts_per_tok=1, score_function="softmax_of_top_k"), False),
    ],
)
def test_gradient_reaches_the_kernel_through_the_gates_and_never_the_bias(settings, reached):
    made, x = router(bias=BIAS if "correction_bias" in settings else None, **settings), normal(13, T, D)
    weights = normal(14, T, settings.get("num_experts_per_tok", K))

    def loss(values, outer):
        return (P.replace(made, values)(x, context(T, inputs={"router_bias": outer})).decision.gates * weights).sum()

    grads, outer = jax.device_get(jax.jit(jax.grad(loss, (0, 1)))(P.arrays(made), jnp.zeros(E)))
    size = np.abs(grads["kernel"]).max()
    assert size > 1e-3 if reached else size < 1e-5
    assert not outer.any() and not np.any(grads.get("correction", 0))


def test_gradient_of_the_gates_is_that_of_the_formula_with_the_selection_held():
    made, x = router(score_function="sigmoid", routed_scaling_factor=2.5), normal(15, T, D)
    experts, weights = route(made, x).decision.experts, normal(16, T, K)

    def formula(kernel):
        s = jnp.take_along_axis(jax.nn.sigmoid(x @ kernel), experts, axis=-1)
        return (2.5 * s / s.sum(-1, keepdims=True) * weights).sum()

    ours = jax.grad(lambda kernel: (P.replace(made, {"kernel": kernel})(x, context(T)).decision.gates * weights).sum())
    kernel = made.kernel[...]
    np.testing.assert_allclose(jax.jit(ours)(kernel), jax.jit(jax.grad(formula))(kernel), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings, E, words",
    [
        (dict(num_experts_per_tok=5), 4, ["num_experts_per_tok", "5", "4"]),
        (dict(n_group=3, topk_group=1), 4, ["n_group", "3", "4"]),
        (dict(num_experts_per_tok=3, n_group=4, topk_group=1), 8, ["num_experts_per_tok", "3", "2"]),
        (dict(n_group=2, topk_group=3), 8, ["topk_group", "3", "2"]),
        (dict(bias_update_rate=0.1), 8, ["bias_update_rate", "correction_bias"]),
        (dict(num_experts_per_tok=0), 8, ["num_experts_per_tok", "0"]),
        (dict(init_std=-1.0), 8, ["init_std", "-1.0"]),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, E, words):
    with pytest.raises(ConfigError) as error:
        config = dataclasses.replace(TopKConfig(num_experts_per_tok=2), **settings)
        config.validate("model.router")
        config.validate_for(E, "model.router")
    assert all(w in str(error.value) for w in ["model.router.", *words]), error.value
