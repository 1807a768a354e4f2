"""Modality groups: the batch's picks and the predictor's against loops, who competes with whom, what trains what."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import best, context, normal, sigmoid, silu

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.data import embedded, installed
from moe_zoo.routing import by_domain
from moe_zoo.routing.modality_groups import ModalityGroups, ModalityGroupsConfig, best_of_batch
from moe_zoo.routing.router import Dims
from moe_zoo.train.config import load_config

T, D, E, B = 64, 6, 6, 4
X = normal(0, T, D)
GROUP = np.random.default_rng(1).permutation(np.arange(T) % 3 == 0).astype(np.int32)  # a third is of group 1
VALID = np.arange(T) % 16 < 13
KEY = jax.random.key(3)


def made(seed=0, **settings) -> ModalityGroups:
    settings = {"gumbel_noise": False, "init_std": 1.0, **settings}
    return P.materialize(ModalityGroups(ModalityGroupsConfig(**settings), Dims(E, D)), seed)


route = jax.jit(lambda router, x, ctx: router(x, ctx))


def routed(router, x=X, group=GROUP, train=True, valid=VALID, **more):
    return route(router, x, context(T, batch=B, train=train, valid=valid, domain=group, key=KEY, **more))


def weights(router):
    return (np.asarray(w[...], np.float64) for w in (router.kernel, router.predict_in, router.predict_out))


def picks(scores_TE, group, valid, cf):
    """Expert by expert, who is taken."""
    taken, size = np.zeros((T, E), bool), E // 2
    for e in range(E):
        members = [t for t in range(T) if valid[t] and group[t] == e // size]
        k = int(np.ceil(round(cf * len(members) / size, 6)))
        taken[[members[i] for i in best([scores_TE[t, e] for t in members], k)], e] = True
    return taken


def member(group=GROUP, valid=VALID):
    return (group[:, None] == np.arange(E) // (E // 2)) & valid[:, None]


@pytest.mark.parametrize("cf", [1.0, 1.5, 3.0])
def test_in_training_experts_pick_the_best_tokens_of_their_group(cf):
    router = made(capacity_factor=cf)
    logits = np.asarray(X, np.float64) @ next(weights(router))
    taken = picks(logits, GROUP, VALID, cf)
    gates = routed(router).decision.gates
    np.testing.assert_array_equal(np.asarray(gates) > 0, taken)
    np.testing.assert_allclose(gates, np.where(taken, sigmoid(logits), 0), rtol=1e-4)
    if cf == 3.0:  # as many as there are experts: everybody is taken by all
        np.testing.assert_array_equal(taken, member())


def test_slots_of_a_group_are_as_many_as_its_tokens():
    """With cf = 1 and a number of members that E_M divides; whatever share of the batch a group has."""
    for ones in (0, 3, 33, 63):
        group = (np.arange(T) < ones).astype(np.int32)
        taken = np.asarray(best_of_batch(normal(4, T, E), jnp.asarray(member(group, np.ones(T, bool))), 1 / 3))
        assert taken[:, 3:].sum(0).tolist() == [ones // 3] * 3
        assert taken[:, :3].sum(0).tolist() == [-(-(T - ones) // 3)] * 3


def test_at_inference_each_token_follows_its_prediction_with_the_routers_weight():
    router = made()
    kernel, first, second = weights(router)
    gates = np.asarray(routed(router, train=False).decision.gates)
    for t in range(T):
        x = np.asarray(X[t], np.float64)
        taken = (sigmoid(silu(x @ first) @ second) > 0.5) & member()[t]
        np.testing.assert_allclose(gates[t], np.where(taken, sigmoid(x @ kernel), 0), rtol=1e-4)
    assert {0, 1, 2} <= set((gates > 0).sum(1).tolist())


def test_the_future_matters_in_training_alone():
    router, later = made(), X.at[T - 1].set(9 * made().kernel[...][:, :3].sum(1))
    group = np.zeros(T, np.int32)
    others = lambda train: [
        np.asarray(routed(router, x, group, train, valid=None).decision.gates)[: T - 1] for x in (X, later)
    ]
    assert not (others(True)[0] == others(True)[1]).all()
    np.testing.assert_array_equal(*others(False))


@pytest.mark.parametrize("train", [True, False])
def test_a_group_knows_nothing_of_the_others_nor_of_padding_nor_of_the_order(train):
    router = made()
    before = np.asarray(routed(router, train=train).decision.gates)
    changed = P.replace(router, {**P.arrays(router), "kernel": router.kernel[...].at[:, 3:].set(normal(5, D, 3))})
    x = jnp.where((GROUP == 1)[:, None] | ~VALID[:, None], normal(6, T, D), X)
    after = np.asarray(routed(changed, x, train=train).decision.gates)
    np.testing.assert_array_equal(after[GROUP == 0], before[GROUP == 0])
    assert not (after == before).all() and not after[~VALID].any()
    order = np.random.default_rng(7).permutation(T)
    mixed = routed(router, X[order], GROUP[order], train, VALID[order]).decision.gates
    np.testing.assert_allclose(mixed, before[order], rtol=1e-6)


def test_one_expert_to_a_group_is_a_network_for_each_modality():
    router = P.materialize(ModalityGroups(ModalityGroupsConfig(gumbel_noise=False), Dims(2, D)), 0)
    gates = routed(router).decision.gates
    logits = np.asarray(X, np.float64) @ next(weights(router))
    both = (GROUP[:, None] == np.arange(2)) & VALID[:, None]
    np.testing.assert_allclose(gates, np.where(both, sigmoid(logits), 0), rtol=1e-4)


def test_noise_is_the_difference_of_two_gumbel_variables_and_no_target():
    n = 4000
    quiet, noisy = (P.materialize(ModalityGroups(ModalityGroupsConfig(1, (), 3.0, on), Dims(3, D)), 0) for on in (0, 1))
    x = jnp.tile(X[:1], (n, 1))
    ctx = context(n, train=True, key=KEY)
    a, b = (route(r, x, ctx) for r in (quiet, noisy))
    logit = lambda gates: np.log(gates) - np.log1p(-gates)
    noise = logit(np.asarray(b.decision.gates, np.float64)) - logit(np.asarray(a.decision.gates, np.float64))
    gumbel = np.random.default_rng(0).gumbel(size=(2, 3 * n))
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert np.quantile(noise, q) == pytest.approx(np.quantile(gumbel[0] - gumbel[1], q), abs=0.12)
    np.testing.assert_array_equal(routed(noisy := made(gumbel_noise=True), train=False).decision.gates,
                                  routed(made(), train=False).decision.gates)  # fmt: skip
    with_noise, without = routed(noisy), routed(made())
    assert not (np.asarray(with_noise.decision.gates > 0) == np.asarray(without.decision.gates > 0)).all()
    for name in ("losses", "stats"):
        what = {"losses": "expert_predictor", "stats": "predictor_f1"}[name]
        one, other = (jax.tree.leaves(getattr(r.aux, name)[what]) for r in (with_noise, without))
        np.testing.assert_array_equal(one, other)


def test_loss_is_the_cross_entropy_to_what_the_batch_picks():
    router = made()
    kernel, first, second = weights(router)
    x = np.asarray(X, np.float64)
    taken, q = picks(x @ kernel, GROUP, VALID, 1.0), sigmoid(silu(x @ first) @ second)
    bits = [-np.log(q[t, e] if taken[t, e] else 1 - q[t, e]) for t, e in np.argwhere(member())]
    aux = routed(router).aux
    assert float(aux.losses["expert_predictor"]) == pytest.approx(np.mean(bits), rel=1e-4)
    right, all_picks = (taken & (q > 0.5))[member()].sum(), (q > 0.5)[member()].sum() + taken.sum()
    assert float(aux.stats["predictor_f1"].value()) == pytest.approx(2 * right / all_picks)
    assert float(aux.stats["coverage"].value()) == pytest.approx(taken.any(1)[VALID].mean())


def test_the_predictor_learns_from_its_loss_alone_and_nothing_else_does():
    router = made()

    def loss(values, x, of_gates):
        routing = routed(P.replace(router, values), x)
        return (routing.decision.gates**2).sum() if of_gates else routing.aux.losses["expert_predictor"]

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    for of_gates, trained in ((True, {"kernel"}), (False, {"predict_in", "predict_out"})):
        values, x = grad(P.arrays(router), X, of_gates)
        assert {name for name, g in values.items() if np.abs(g).max() > 1e-4} == trained
        assert (float(jnp.abs(x).max()) > 0) == of_gates


def test_the_predictor_comes_to_pick_what_the_batch_picks():
    router = P.materialize(ModalityGroups(ModalityGroupsConfig(gumbel_noise=False, init_std=1.0), Dims(E, 16)), 0)
    x = normal(8, 512, 16)
    ctx = context(512, train=True, domain=np.arange(512, dtype=np.int32) % 2)

    @jax.jit
    def trained(values):
        loss = lambda v: P.replace(router, v)(x, ctx).aux.losses["expert_predictor"]
        return jax.lax.fori_loop(
            0, 400, lambda _, v: jax.tree.map(lambda w, g: w - 3 * g, v, jax.grad(loss)(v)), values
        )

    f1 = lambda values: float(route(P.replace(router, values), x, ctx).aux.stats["predictor_f1"].value())
    before = P.arrays(router)
    assert f1(before) < 0.6 and f1(trained(before)) > 0.85


def test_groups_come_from_modalities_or_from_names_and_what_is_unknown_is_of_the_first():
    router = made(groups=("go|c_*=1",))
    values = router.from_corpus(np.zeros(9), ("essays", "go", "c_headers"))
    router = P.replace(router, {**P.arrays(router), "group": jnp.asarray(values["group"])})
    groups = lambda **ids: np.asarray(router.members(context(5, **ids))).argmax(1) // 3
    ids = np.array([0, 1, 2, 7, -1], np.int32)
    assert groups(domain=ids).tolist() == [0, 1, 1, 0, 0] and groups().tolist() == [0] * 5
    assert groups(domain=ids, modality=np.array([1, 0, 1, -1, 0], np.int32)).tolist() == [1, 0, 1, 0, 0]


@pytest.mark.parametrize("domains, formal", [
    (embedded.DOMAINS, {"python_code", "c_headers", "character_names"}),
    (installed.DOMAINS, {"go", "mathematics", "perl_manual", "python_manual", "sql_manual"}),
])  # fmt: skip
def test_the_entry_parts_either_corpus_in_two(domains, formal):
    numbers = by_domain.table(load_config("modality_groups:tiny").model.router.config.groups, domains, "f")
    assert {name for name, number in zip(domains, numbers) if number == 1} == formal < set(domains)


@pytest.mark.parametrize("change, message", [
    (dict(num_groups=4), "4 groups do not divide num_experts=6"),
    (dict(groups=("go=2",)), r"router\.groups: 'go=2' of num_groups=2; at most 1"),
    (dict(capacity_factor=3.5), "3.5 experts per token of groups of 3"),
    (dict(capacity_factor=0.0), r"router\.capacity_factor"),
])  # fmt: skip
def test_impossible_settings_are_refused(change, message):
    config = dataclasses.replace(ModalityGroupsConfig(), **change)
    with pytest.raises(ConfigError, match=message):
        config.validate("router")
        config.validate_for(E, "router")
