"""Hybrid-k against a loop in numpy, what it never changes, how the router learns, families by names of domains."""

import dataclasses

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from naive import context, normal

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.routing import by_domain
from moe_zoo.routing.hybrid_k import HybridK, HybridKConfig
from moe_zoo.routing.router import Dims
from moe_zoo.sharding import make_mesh
from moe_zoo.train.config import load_config
from moe_zoo.train.step import Trainer

T, D, E = 60, 5, 6
X = normal(0, T, D)
IDS = np.random.default_rng(1).integers(-1, 9, T).astype(np.int32)  # more domains than experts, and some unknown
NAMES = ("help_de", "help_en", "help_ja", "go", "essays")


def made(**settings) -> HybridK:
    return P.materialize(HybridK(HybridKConfig(init_std=1.0, **settings), Dims(E, D)), 0)


route = jax.jit(lambda router, x, ctx: router(x, ctx))


def loop(router, ids, K, norm=False):
    """(experts, gates) by the definition, with the last choice replaced; `ids` None: plain top-k."""
    logits = np.asarray(X, np.float64) @ np.asarray(router.kernel[...], np.float64)
    experts, gates = np.zeros((T, K), int), np.zeros((T, K))
    for t in range(T):
        p = naive.softmax(logits[t])
        chosen = naive.best(p, K)
        if ids is not None and ids[t] >= 0 and ids[t] % E not in chosen:
            chosen[-1] = ids[t] % E
        experts[t], gates[t] = chosen, p[chosen] / (p[chosen].sum() if norm else 1)
    return experts, gates


@pytest.mark.parametrize("K, norm", [(1, False), (2, False), (3, True)])
def test_training_replaces_the_last_choice_and_inference_knows_no_id(K, norm):
    router = made(num_experts_per_tok=K, norm_topk_prob=norm)
    for train, ids in ((True, IDS), (True, None), (False, IDS)):
        routing = route(router, X, context(T, train=train, domain=ids))
        experts, gates = loop(router, ids if train else None, K, norm)
        np.testing.assert_array_equal(routing.decision.experts, experts)
        np.testing.assert_allclose(routing.decision.gates, gates, rtol=1e-4)


@pytest.mark.parametrize("K", [1, 2, 3])
def test_every_token_with_an_id_visits_its_expert_and_the_best_stay(K):
    router = made(num_experts_per_tok=K)
    before, after = (
        np.asarray(route(router, X, context(T, train=train, domain=IDS)).decision.experts) for train in (False, True)
    )
    known = IDS >= 0
    assert (after == (IDS % E)[:, None]).any(1)[known].all() and 0 < known.sum() < T
    np.testing.assert_array_equal(after[:, : K - 1], before[:, : K - 1])
    np.testing.assert_array_equal(after[~known], before[~known])
    assert all(len(set(row)) == K for row in after.tolist())


def test_a_language_id_goes_before_a_domain_and_padding_is_not_counted():
    router, other = made(), np.where(IDS < 0, 2, (IDS + 1) % 9).astype(np.int32)
    valid = jnp.asarray(np.arange(T) % 3 > 0)
    ctx = context(T, train=True, valid=valid)
    both = route(router, X, ctx.replace(domain=IDS, language=other))
    alone = route(router, X, ctx.replace(domain=other))
    np.testing.assert_array_equal(both.decision.experts, alone.decision.experts)
    plain = route(router, X, context(T)).decision.experts
    changed = (np.asarray(alone.decision.experts) != np.asarray(plain)).any(1)[valid]
    assert float(alone.aux.stats["replaced_fraction"].value()) == pytest.approx(changed.mean())


def test_the_router_learns_through_the_probability_of_the_expert_that_was_put_in():
    router = made()
    before, after = (route(router, X, context(T, train=t, domain=IDS)).decision.experts for t in (False, True))
    t = int(np.flatnonzero(np.asarray(before != after).any(1))[0])
    ctx = context(T, train=True, domain=IDS)
    gate = lambda kernel: P.replace(router, {"kernel": kernel})(X, ctx).decision.gates[t, 1]
    p = naive.softmax(np.asarray(X[t], np.float64) @ np.asarray(router.kernel[...], np.float64))
    own = IDS[t] % E
    expected = np.outer(np.asarray(X[t], np.float64), p[own] * ((np.arange(E) == own) - p))
    np.testing.assert_allclose(jax.jit(jax.grad(gate))(router.kernel[...]), expected, rtol=1e-3, atol=1e-6)


def test_equal_experts_weigh_less_than_one_unless_renormalised():
    """Right after upcycling every expert is the dense network: the layer is (p_1 + p_2) of it, exact only with norm."""
    x = jnp.zeros((T, D))
    for norm, weight in ((False, 2 / E), (True, 1.0)):
        gates = route(made(norm_topk_prob=norm), x, context(T)).decision.gates
        np.testing.assert_allclose(gates.sum(-1), weight, rtol=1e-5)


def test_families_are_rules_over_names_and_the_first_counts():
    numbers = by_domain.table(["help_de | help_en=2", "help_*=1", "go=0"], NAMES, "f")
    np.testing.assert_array_equal(numbers[:6], [2, 2, 1, 0, -1, -1])
    ids = jnp.asarray([-1, 0, 2, 3, 4, 7, 1000], jnp.int32)
    np.testing.assert_array_equal(by_domain.numbers_of(ids, jnp.asarray(numbers), E), [-1, 2, 1, 0, -1, -1, -1])
    np.testing.assert_array_equal(by_domain.numbers_of(ids, None, E), [-1, 0, 2, 3, 4, 1, 1000 % E])
    with pytest.raises(ConfigError, match="f: 'hlep_de' matches no domain.*did you mean 'help_de'"):
        by_domain.table(["hlep_de=1"], NAMES, "f")
    with pytest.raises(ConfigError, match="300 domains; at most 256"):
        by_domain.table(["*=1"], [f"d{i}" for i in range(300)], "f")


def test_a_run_learns_the_names_from_its_data_also_when_its_weights_are_given():
    config = load_config("hybrid_k:tiny", [("model.router.families", "['help_*=3', 'go=1']")])
    trainer = Trainer(config, make_mesh(devices=jax.devices()[:1]), config.train.objective.make())
    counts, path = np.zeros(config.model.vocab_size, int), "segments.0.blocks.0.ffn.router.family"
    state = trainer.init_state(counts, domains=NAMES)
    others = trainer.init_state(counts, given={path: state["buffers"][path]}, domains=NAMES[::-1])
    for found, expected in ((state, [3, 3, 3, 1, -1]), (others, [-1, 1, 3, 3, 3])):
        np.testing.assert_array_equal(found["buffers"][path][:, :5], np.tile(expected, (2, 1)))
    assert set(np.unique(trainer.init_state()["buffers"][path])) == {-1}


@pytest.mark.parametrize("change, message", [
    (dict(families=("help_de=six",)), r"router\.families: 'help_de=six'; expected"),
    (dict(families=("=1",)), r"router\.families"),
    (dict(families=("a||b=1",)), r"router\.families"),
    (dict(families=("help_de=6",)), r"'help_de=6' of num_experts=6; at most 5"),
    (dict(num_experts_per_tok=7), "at most 6"),
    (dict(init_std=0.0), r"router\.init_std"),
])  # fmt: skip
def test_impossible_settings_are_refused(change, message):
    config = dataclasses.replace(HybridKConfig(), **change)
    with pytest.raises(ConfigError, match=message):
        config.validate("router")
        config.validate_for(E, "router")
