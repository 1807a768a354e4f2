"""Duo-LLM: the bank against a loop and on a mesh, whole models against dense ones, router, budget and oracle."""

import functools
import math

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from naive import normal

from moe_zoo.core import param as P
from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.decision import Dense, TokenChoice
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build
from moe_zoo.dispatch.dropless import Dropless
from moe_zoo.dispatch.everywhere import Everywhere
from moe_zoo.experts.big_small import BIG, SKIP, SMALL, BigSmall, BigSmallConfig
from moe_zoo.inference import Loaded
from moe_zoo.models import Decoder, ModelConfig
from moe_zoo.models.decoder import ModelAux
from moe_zoo.routing.duo_llm import DuoLLM, DuoLLMConfig
from moe_zoo.routing.router import Dims
from moe_zoo.sharding import MeshConfig, make_mesh
from moe_zoo.train.global_budget import GlobalBudget, GlobalBudgetConfig
from moe_zoo.train.objective import cross_entropy
from moe_zoo.transform import losses_along, oracle, patterns, search_apart, search_greedily

T, D, F, RATIO = 16, 8, 8, 4
N, S, L = 2, 5, 3
TEXT = np.random.default_rng(3).integers(0, 32, (N, S + 1)).astype(np.int32)
TOKENS, TARGETS = TEXT[:, :-1], TEXT[:, 1:]
CTX = RoutingContext(batch=1, seq=T)


# ----------------------------------------------------------------------------------------------------------- the bank


@functools.cache
def bank(num_experts: int = 3, ratio: int = 2) -> BigSmall:
    made = BigSmall(
        BigSmallConfig(ratio=ratio), num_experts=num_experts, hidden_size=D, intermediate_size=F, out_scale=1.0
    )
    return P.materialize(made, 0)


def choice(experts_T) -> TokenChoice:
    experts_T1 = jnp.asarray(experts_T, jnp.int32)[:, None]
    return TokenChoice(experts_T1, jnp.ones(experts_T1.shape), 3)


@functools.partial(jax.jit, static_argnums=4)
def learned(bank, x_TD, experts_T, counts_T, mesh):
    """Output, and gradients for the networks of what some of the tokens get."""

    def loss(bank):
        y_TD, _ = Dropless()(x_TD, choice(experts_T), bank, CTX.replace(mesh=mesh))
        return (jnp.sin(y_TD) * counts_T[:, None]).sum(), y_TD

    (_, y_TD), grads = jax.value_and_grad(loss, has_aux=True)(bank)
    return y_TD, P.arrays(grads)


EXPERTS = np.random.default_rng(0).permutation(np.repeat([BIG, SMALL, SKIP], [7, 6, 3]))
X = np.asarray(normal(1, T, D))


def test_bank_equals_a_loop_over_tokens():
    weights = lambda mlp: [np.asarray(getattr(mlp, n)[...], np.float64) for n in ("w_gate", "w_up", "w_down")]
    networks = [weights(bank().big), weights(bank().small)]
    assert [w[0].shape for w in networks] == [(D, F), (D, F // 2)]
    expected = [naive.ffn(x, *networks[e]) if e < SKIP else np.zeros(D) for x, e in zip(X, EXPERTS)]
    y, _ = learned(bank(), X, EXPERTS, np.ones(T), None)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(y)[EXPERTS == SKIP], 0)
    everywhere, _ = Everywhere()(jnp.asarray(X), choice(EXPERTS), bank(), CTX)
    np.testing.assert_allclose(everywhere, expected, atol=1e-5)


def test_a_network_learns_nothing_from_tokens_that_chose_the_other():
    for mine, other in (("big", "small"), ("small", "big")):
        tokens = EXPERTS == (BIG if mine == "big" else SMALL)
        _, grads = learned(bank(), X, EXPERTS, tokens.astype(np.float32), None)
        for name, grad in grads.items():
            assert bool(np.any(grad)) == name.startswith(mine), name
            assert name.startswith((mine, other))


def test_equal_networks_make_the_choice_indifferent():
    same = bank(2, ratio=1)
    values = P.arrays(same)
    same = P.replace(same, {n: values[n.replace("small", "big")] for n in values})
    of = lambda e: TokenChoice(jnp.full((T, 1), e), jnp.ones((T, 1)), 2)
    np.testing.assert_array_equal(*(Everywhere()(jnp.asarray(X), of(e), same, CTX)[0] for e in (BIG, SMALL)))


def test_the_bank_on_a_mesh_equals_one_device():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    one, many = (learned(bank(), X, EXPERTS, np.ones(T), where) for where in (None, mesh))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="num_experts: 4"):
        bank(4)
    with pytest.raises(ConfigError, match="8 does not divide by experts.ratio=3"):
        bank(2, ratio=3)


# --------------------------------------------------------------------------------------------------- models and oracle


def model_config(**changes) -> ModelConfig:
    return build(
        ModelConfig,
        {
            "vocab_size": 32, "hidden_size": 16, "layers": f"{L}*moe", "num_experts": 2, "moe_intermediate_size": 32,
            "experts": {"name": "big_small", "ratio": RATIO}, "attention": {"num_attention_heads": 2},
            "router": {"name": "duo_llm"}, "losses": {}, **changes,
        },
        "model",
    )  # fmt: skip


@functools.cache
def duo() -> Loaded:
    """With weights as large as a trained model's, so that routes matter."""
    model = P.materialize(Decoder(model_config()), 0)
    large = {n: (30 if n.startswith("embed.") else 3) * a for n, a in P.arrays(model).items()}
    return Loaded(P.replace(model, large), model_config(), None)


@functools.cache
def along_all() -> np.ndarray:
    return losses_along(duo(), TOKENS, TARGETS, patterns(L))


@functools.cache
def greedy():
    return search_greedily(duo(), TOKENS, TARGETS, patterns(L))


@pytest.mark.parametrize("name, width", [("big", 32), ("small", 32 // RATIO)])
def test_one_network_for_all_is_the_dense_model(name, width):
    dense = Decoder(model_config(layers=f"{L}*dense", intermediate_size=width, router={"name": "top_k"}))
    values = P.arrays(duo().model)
    dense = P.replace(dense, {n: values[n.replace(".ffn.", f".ffn.experts.{name}.")] for n in P.flat(dense)})
    logits = jax.jit(lambda tokens: dense(tokens)[0])(TOKENS)
    which = patterns(L).sum(1).tolist().index(0 if name == "big" else L)
    np.testing.assert_allclose(along_all()[which], cross_entropy(logits, TARGETS), atol=1e-5)


def test_there_are_as_many_patterns_as_ways_to_choose_layers():
    for b in range(6):
        exactly, at_most = patterns(5, b), patterns(5, b, at_most=True)
        assert len(exactly) == math.comb(5, b) and len(at_most) == sum(math.comb(5, k) for k in range(b + 1))
        assert ((exactly == 0).sum(1) == b).all() and len(np.unique(at_most, axis=0)) == len(at_most)
    assert len(patterns(3, modules=3)) == 27 and len(patterns(3, 1, modules=3)) == 3 * 4
    assert (np.diff((patterns(3) == 0).sum(1)) >= 0).all()
    with pytest.raises(ValueError, match="7 big layers of 5"):
        patterns(5, 7)


def test_no_pattern_is_better_than_the_oracle_and_a_larger_budget_is_never_worse():
    every = search_apart(duo(), TOKENS, TARGETS, patterns(L))
    assert (every.loss <= along_all()).all() and every.loss.mean() < along_all().mean((1, 2)).min()
    big = (every.patterns == 0).sum(1)
    at_most = [every.losses[big <= b].min(0) for b in range(L + 1)]
    for smaller, larger in zip(at_most, at_most[1:]):
        assert (larger <= smaller).all()
    np.testing.assert_allclose(every.difficulty, at_most[0] - every.losses[big > 0].min(0))


def test_greedy_search_equals_trying_every_pattern_in_parallel_form():
    """Token by token: chosen routes before it, each pattern at it, anything behind it."""
    found, every = greedy(), patterns(L)
    for t in range(S):
        routes = np.repeat(found.routes[None], len(every), 0)
        routes[:, :, t] = every[:, None]
        routes[:, :, t + 1 :] = 1
        tried = losses_along(duo(), TOKENS, TARGETS, routes)[:, :, t]
        np.testing.assert_allclose(found.losses[:, :, t], tried, atol=2e-5)
    np.testing.assert_array_equal(found.chosen, found.losses.argmin(0))
    again = losses_along(duo(), TOKENS, TARGETS, np.repeat(found.routes[None], len(every), 0))[0]
    np.testing.assert_allclose(found.loss, again, atol=2e-5)


def test_greedy_search_looks_at_no_later_token_and_has_one_program_for_all_budgets():
    found, changed = greedy(), TEXT.copy()
    changed[:, -1] = (changed[:, -1] + 5) % 32
    later = search_greedily(duo(), changed[:, :-1], changed[:, 1:], patterns(L))
    np.testing.assert_array_equal(later.routes[:, :-1], found.routes[:, :-1])
    assert (later.losses[:, :, -1] != found.losses[:, :, -1]).any()
    before = oracle._greedy._cache_size()
    for b in range(L + 1):
        of_budget = search_greedily(duo(), TOKENS, TARGETS, patterns(L, b))
        assert ((of_budget.routes == 0).sum(-1) == b).all()
    np.testing.assert_allclose(of_budget.loss, along_all()[-1], atol=2e-5)  # all big
    assert oracle._greedy._cache_size() == before == 1
    with pytest.raises(ValueError, match="compares budgets"):
        _ = of_budget.difficulty


def test_what_no_route_can_say_is_refused():
    for change, word in (
        ({"layers": "1*dense 2*moe"}, "'dense' is not routed"),
        ({"layers": "2*moe"}, "3 layers and experts up to 1; the model has 2"),
        ({"mixer": {"name": "mamba"}}, "needs attention"),
    ):
        other = Loaded(None, model_config(**change), None)
        with pytest.raises(ConfigError, match=word):
            search_greedily(other, TOKENS, TARGETS, patterns(L))
    for routes, word in ((-patterns(L), "expected experts"), (patterns(L) * 1.0, "float64"), (patterns(L)[:0], "0, 3")):
        with pytest.raises(ConfigError, match=word):
            losses_along(duo(), TOKENS, TARGETS, routes)
    with pytest.raises(ConfigError, match="both"):
        losses_along(duo(), TOKENS, TARGETS[:, 1:], patterns(L))


# --------------------------------------------------------------------------------------------------- router and budget


@functools.cache
def router(scale: float = 1.0) -> DuoLLM:
    made = DuoLLM(DuoLLMConfig(temperature=2.0, final_temperature=8.0, total_steps=10), Dims(2, D))
    return P.replace(made, {"kernel": scale * normal(5, D, 2)})


def test_router_mixes_in_training_and_takes_the_likeliest_at_inference():
    z = X.astype(np.float64) @ np.asarray(router().kernel[...], np.float64)
    mixed = jax.jit(lambda step: router()(jnp.asarray(X), CTX.replace(train=True, step=step)))
    for step, tau in ((0, 2.0), (5, 4.0), (10, 8.0), (30, 8.0)):
        routing = mixed(jnp.int32(step))
        expected = np.stack([naive.softmax(tau * row) for row in z])
        np.testing.assert_allclose(routing.decision.gates, expected, atol=1e-5)
        np.testing.assert_allclose(routing.aux.terms["budget"].value(), expected[:, 0].mean(), atol=1e-6)
    valid = np.arange(T) < 9
    routing = router()(jnp.asarray(X), CTX.replace(valid=jnp.asarray(valid)))
    np.testing.assert_array_equal(routing.decision.experts[:, 0], z.argmax(1))
    np.testing.assert_array_equal(routing.decision.gates, 1)
    assert float(routing.aux.stats["big_share"].value()) == pytest.approx((z.argmax(1) == 0)[valid].mean())


def test_a_mixture_of_one_network_is_the_hard_route():
    """Where p is 1 or 0 exactly, training computes what inference does."""
    sure, x = router(1e5), jnp.asarray(X)
    soft, hard = (sure(x, CTX.replace(train=train, step=jnp.int32(0))).decision for train in (True, False))
    assert isinstance(soft, Dense) and set(np.unique(soft.gates)) == {0.0, 1.0}
    out = [Everywhere()(x, decision, bank(2), CTX)[0] for decision in (soft, hard)]
    np.testing.assert_array_equal(*out)


def test_the_budget_is_of_all_layers_together():
    objective, ctx = GlobalBudget(GlobalBudgetConfig(share=0.5, weight=3.0)), CTX.replace(train=True, step=jnp.int32(0))

    def loss(kernels):
        """Of three layers, in two stacked blocks."""
        terms = [P.replace(router(), {"kernel": kernel})(jnp.asarray(X), ctx).aux.terms for kernel in kernels]
        stacked = lambda parts: Aux(terms=jax.tree.map(lambda *a: jnp.stack(a), *parts))
        blocks = {"a": (jnp.arange(2), stacked(terms[:2])), "b": (jnp.arange(1), stacked(terms[2:]))}
        return objective.extra(ModelAux({}, blocks), {})[0]

    kernels = [np.asarray(normal(i, D, 2)) for i in range(3)]
    p = [np.stack([naive.softmax(2.0 * row) for row in X @ kernel]) for kernel in kernels]
    mean = np.mean([probs[:, 0] for probs in p])
    value, grads = jax.jit(jax.value_and_grad(loss))(kernels)
    assert float(value) == pytest.approx(3 * (mean - 0.5) ** 2, rel=1e-4)
    for probs, grad in zip(p, grads):
        slope = 2 * 3 * (mean - 0.5) * 2 * probs[:, 0] * probs[:, 1] / (3 * T)  # of z_big - z_small
        np.testing.assert_allclose(grad, X.T @ np.stack([slope, -slope], 1), atol=1e-5)
    # one layer takes all and another nothing: together they keep to the budget
    uneven = Aux(terms={"budget": Stat.mean(jnp.array([T, 0.0]), jnp.array([T, T]))})
    assert float(objective.extra(ModelAux({}, {"a": (jnp.arange(2), uneven)}), {})[0]) == 0
    padding = Aux(terms={"budget": Stat.mean(jnp.zeros(2), jnp.zeros(2))})
    assert float(objective.extra(ModelAux({}, {"a": (jnp.arange(2), padding)}), {})[0]) == 0
    with pytest.raises(ConfigError, match="'duo_llm'"):
        objective.extra(ModelAux({}, {}), {})
