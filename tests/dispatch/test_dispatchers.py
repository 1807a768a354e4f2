"""Dropless and capacity dispatch against a loop over tokens: values, gradients, drops."""

import functools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from naive import context, normal

from moe_zoo.core import param as P
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.registry import ConfigError
from moe_zoo.dispatch.capacity import Capacity, CapacityConfig
from moe_zoo.dispatch.dropless import Dropless, DroplessConfig
from moe_zoo.experts.feed_forward import FeedForward
from moe_zoo.layers.mlp import FeedForwardConfig

B, S, D, F, E, K = 2, 6, 5, 7, 4, 2
T = B * S
RNG = np.random.default_rng(0)
RAGGED = np.stack([RNG.permutation(E)[:K] for _ in range(T)])
VALID = np.arange(T) % 4 != 1

CHOICES = {
    "every expert used": RAGGED,
    "empty experts": np.stack([RNG.permutation([0, 1, 3])[:K] for _ in range(T)]),
    "all to one": np.stack([np.full(T, 1), np.full(T, E)], 1),
    "all to the last": np.stack([np.full(T, E - 1), np.full(T, E)], 1),
    "some choose none": np.where(RNG.random((T, K)) < 0.4, E, RAGGED),
    "nobody chooses": np.full((T, K), E),
}


def bank(gated=True):
    made = FeedForward(FeedForwardConfig(gated=gated), num_experts=E, hidden_size=D, intermediate_size=F, out_scale=1.0)
    return P.materialize(made, 0)


WEIGHTS = tuple(np.asarray(w) for w in bank().weights(jnp.float32))
GATES = np.abs(RNG.standard_normal((T, K))) + 0.1


def decision(experts, gates=GATES):
    return TokenChoice(jnp.asarray(experts, jnp.int32), jnp.asarray(gates, jnp.float32), E)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def moved(cls, config, train, bank, x, choice):
    return cls(config)(x, choice, bank, context(T, batch=B, train=train))


@functools.partial(jax.jit, static_argnums=(0, 1))
def planned(cls, config, choice):
    if cls is Dropless:
        dispatcher = cls(config)
        return dispatcher.plan(*dispatcher.within_budget(choice))
    return cls(config).plan(choice, context(T, batch=B, train=True))


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradients(cls, config, values, x, gates, experts, out_weights):
    """d sum(y * out_weights) by (weights of the bank, x, gates)."""

    def loss(values, x, gates):
        y, _ = cls(config)(
            x, TokenChoice(experts, gates, E), P.replace(bank(), values), context(T, batch=B, train=True)
        )
        return (y * out_weights).sum()

    return jax.grad(loss, (0, 1, 2))(values, x, gates)


@jax.jit
def dense_gradients(values, x, gates, experts, out_weights):
    """The same by a dense sum over all experts."""

    def loss(values, x, gates):
        every_TED = jnp.einsum(
            "tef,efd->ted",
            jax.nn.silu(jnp.einsum("td,edf->tef", x, values["w_gate"])) * jnp.einsum("td,edf->tef", x, values["w_up"]),
            values["w_down"],
        )
        return (jnp.einsum("tk,tke,ted->td", gates, jax.nn.one_hot(experts, E), every_TED) * out_weights).sum()

    return jax.grad(loss, (0, 1, 2))(values, x, gates)


def close(ours, theirs, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **{"rtol": 1e-4, "atol": 1e-5, **tolerance}), ours, theirs
    )


NEVER_FULL = CapacityConfig(capacity_factor=float(E))
BOTH = [(Dropless, DroplessConfig()), (Capacity, NEVER_FULL)]


@pytest.mark.parametrize("cls, config", BOTH)
@pytest.mark.parametrize("name", CHOICES)
def test_output_is_that_of_a_loop_over_tokens(cls, config, name):
    x, experts = normal(1, T, D), CHOICES[name]
    y, stats = moved(cls, config, True, bank(), x, decision(experts))
    close(y, naive.moe(x, experts, GATES, WEIGHTS))
    assert float(stats["dropped_fraction"].value()) == 0


@pytest.mark.parametrize("cls, config", BOTH)
@pytest.mark.parametrize("name", CHOICES)
def test_gradients_are_those_of_a_dense_sum_over_experts(cls, config, name):
    x, out, experts = normal(2, T, D), normal(3, T, D), decision(CHOICES[name]).experts
    args = (P.arrays(bank()), x, jnp.asarray(GATES, jnp.float32), experts, out)
    close(gradients(cls, config, *args), dense_gradients(*args))


@pytest.mark.parametrize("cls, config", BOTH)
def test_experts_without_a_gate_projection(cls, config):
    x = normal(4, T, D)
    y, _ = moved(cls, config, True, bank(gated=False), x, decision(RAGGED))
    close(y, naive.moe(x, RAGGED, GATES, bank(gated=False).weights(jnp.float32)))


@pytest.mark.parametrize(
    "cls, config", [(Dropless, DroplessConfig(gate_on="input")), (Capacity, CapacityConfig(float(E), gate_on="input"))]
)
def test_gate_on_the_input_goes_through_the_expert(cls, config):
    x = normal(5, T, D)
    y, _ = moved(cls, config, True, bank(), x, decision(RAGGED))
    close(y, naive.moe(x, RAGGED, GATES, WEIGHTS, gate_on="input"))
    assert np.abs(y - naive.moe(x, RAGGED, GATES, WEIGHTS)).max() > 0.05
    out = np.asarray(normal(6, T, D))
    choice = decision(RAGGED)
    by_gates = gradients(cls, config, P.arrays(bank()), x, choice.gates, choice.experts, out)[2]
    for t, k in [(0, 0), (7, 1)]:
        shift = np.zeros((T, K))
        shift[t, k] = 1e-5
        up, down = (naive.moe(x, RAGGED, GATES + s * shift, WEIGHTS, gate_on="input") for s in (1, -1))
        assert float(by_gates[t, k]) == pytest.approx(((up - down) * out).sum() / 2e-5, rel=1e-3)


@pytest.mark.parametrize("group", ["batch", "sequence"])
@pytest.mark.parametrize("name", ["every expert used", "all to one", "some choose none"])
def test_capacity_drops_exactly_what_a_slot_major_loop_drops(group, name):
    x, experts, groups = normal(7, T, D), CHOICES[name], B if group == "sequence" else 1
    C = int(np.ceil(0.25 * K * (T // groups) / E))
    kept = naive.within_capacity(experts, E, C, groups)
    y, stats = moved(Capacity, CapacityConfig(0.25, group=group), True, bank(), x, decision(experts))
    close(y, naive.moe(x, experts, GATES, WEIGHTS, kept_TK=kept))
    live = (experts < E).sum()
    assert kept.sum() < live
    assert float(stats["dropped_fraction"].value()) == pytest.approx((live - kept.sum()) / live)


def test_places_go_to_all_first_choices_before_any_second_one():
    experts = np.array([[0, 1], [0, 1], [1, 0], [E, 0]])
    plan = Capacity(CapacityConfig(100.0)).plan(decision(experts, np.ones((4, 2))), context(4))
    C = plan.num_rows // E
    np.testing.assert_array_equal(plan.slot, experts * C + np.array([[0, 1], [1, 2], [0, 2], [0, 3]]))


@pytest.mark.parametrize("group", ["batch", "sequence"])
@pytest.mark.parametrize("name", ["every expert used", "all to one"])
def test_batch_priority_serves_tokens_by_their_largest_gate(group, name):
    """As if the tokens of each group came in that order; equal ones in their own."""
    experts, groups = CHOICES[name], B if group == "sequence" else 1
    gates = np.round(2 * GATES) / 2  # some are equal
    C = int(np.ceil(0.25 * K * (T // groups) / E))
    order = np.concatenate([g[np.argsort(-gates[g].max(1), kind="stable")] for g in np.arange(T).reshape(groups, -1)])
    kept = np.zeros((T, K), bool)
    kept[order] = naive.within_capacity(experts[order], E, C, groups)
    x, config = normal(15, T, D), CapacityConfig(0.25, group=group, priority="gate")
    y, _ = moved(Capacity, config, True, bank(), x, decision(experts, gates))
    close(y, naive.moe(x, experts, gates, WEIGHTS, kept_TK=kept))
    assert 0 < kept.sum() < (experts < E).sum()
    assert (kept != naive.within_capacity(experts, E, C, groups)).any()


def test_padding_takes_no_capacity():
    x, config = normal(8, T, D), CapacityConfig(0.5)
    masked = decision(RAGGED).masked(jnp.asarray(VALID))
    kept = naive.within_capacity(np.asarray(masked.experts), E, int(np.ceil(0.5 * K * T / E)))
    assert (kept != naive.within_capacity(RAGGED, E, 3))[VALID].any()
    y, _ = moved(Capacity, config, True, bank(), x, masked)
    close(y, naive.moe(x, np.asarray(masked.experts), GATES, WEIGHTS, kept_TK=kept))
    assert not np.asarray(y)[~VALID].any()


def test_evaluation_never_drops_unless_given_a_factor():
    all_to_one, x = decision(CHOICES["all to one"]), normal(9, T, D)
    dropped = lambda config: float(moved(Capacity, config, False, bank(), x, all_to_one)[1]["dropped_fraction"].value())
    assert dropped(CapacityConfig(0.25)) == 0
    assert dropped(CapacityConfig(4.0, eval_capacity_factor=0.25)) == pytest.approx((T - 2) / T)


@pytest.mark.parametrize(
    "T, K, E, factor, places", [(64, 2, 8, 1.25, 20), (10, 1, 4, 1.0, 3), (10, 2, 4, 99.0, 10), (100, 1, 10, 1.1, 11)]
)
def test_capacity_is_the_ceiling_of_its_formula_and_at_most_the_tokens(T, K, E, factor, places):
    assert Capacity(CapacityConfig(factor)).capacity(T, K, E, train=True) == places


@pytest.mark.parametrize("T, places", [(9, 4), (12, 6), (18, 10), (22, 12), (3, 3)])
def test_capacity_may_be_an_even_number_and_no_less_than_some(T, places):
    """ColossalAI's: 4 T / 8 rounded down, from there up to an even number, at least 4."""
    config = CapacityConfig(9.0, eval_capacity_factor=2.0, rounding="even", min_capacity=4)
    assert Capacity(config).capacity(T, 2, 8, train=False) == places


def test_a_capacity_in_tokens_is_that_of_any_group_in_training_or_not():
    fixed = Capacity(CapacityConfig(9.0, eval_capacity_factor=9.0, expert_capacity=12))
    found = [fixed.capacity(T, 2, 4, train) for T in (10, 100) for train in (True, False)]
    assert found == [10, 10, 12, 12]


@pytest.mark.parametrize("budget", [0.25, 1.5])
@pytest.mark.parametrize("name", ["every expert used", "some choose none"])
def test_row_budget_keeps_the_largest_gates_and_counts_the_rest(budget, name):
    x, experts = normal(10, T, D), CHOICES[name]
    gates = np.where(np.arange(T)[:, None] % 3 == 0, -GATES, GATES)  # size counts, not sign
    R, live = int(np.ceil(budget * T)), experts < E
    ranked = sorted(zip(*np.nonzero(live)), key=lambda tk: -abs(np.float32(gates[tk])))
    kept = np.zeros((T, K), bool)
    kept[tuple(np.array(ranked[:R]).T)] = True
    y, stats = moved(Dropless, DroplessConfig(row_budget=budget), True, bank(), x, decision(experts, gates))
    close(y, naive.moe(x, experts, gates, WEIGHTS, kept_TK=kept))
    assert float(stats["dropped_fraction"].value()) == pytest.approx(max(0, live.sum() - R) / live.sum())


def test_row_budget_uses_that_many_rows_and_ties_go_to_earlier_choices():
    same = decision(RAGGED, np.ones((T, K)))
    plan = planned(Dropless, DroplessConfig(row_budget=0.5), same)
    assert plan.num_rows == 6
    np.testing.assert_array_equal(np.asarray(plan.slot).ravel() < 6, np.arange(T * K) < 6)


@pytest.mark.parametrize("cls, config", [*BOTH, (Capacity, CapacityConfig(0.5)), (Dropless, DroplessConfig(0.5))])
def test_rows_and_choices_are_inverse_to_each_other(cls, config):
    choice = decision(CHOICES["some choose none"])
    plan = jax.device_get(planned(cls, config, choice))
    slot, rows = plan.slot.ravel(), plan.num_rows
    used = np.nonzero(slot < rows)[0]
    np.testing.assert_array_equal(plan.choice[slot[used]], used)
    assert (plan.choice < T * K).sum() == len(used)
    row_expert = CHOICES["some choose none"].ravel()[plan.choice[plan.choice < T * K]]
    assert (np.diff(row_expert) >= 0).all(), "rows lie expert after expert"
    if plan.group_sizes is not None:
        np.testing.assert_array_equal(plan.group_sizes, np.bincount(row_expert, minlength=E))


@pytest.mark.parametrize("cls, config", BOTH)
def test_nan_in_tokens_that_go_nowhere_reaches_no_other_token_and_no_gradient(cls, config):
    x, masked = normal(11, T, D), decision(RAGGED).masked(jnp.asarray(VALID))
    poisoned = jnp.where(jnp.asarray(VALID)[:, None], x, jnp.nan)
    clean, _ = moved(cls, config, True, bank(), x, masked)
    y, _ = moved(cls, config, True, bank(), poisoned, masked)
    np.testing.assert_array_equal(y, clean)
    grads = gradients(cls, config, P.arrays(bank()), poisoned, masked.gates, masked.experts, normal(12, T, D))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("cls, config", BOTH)
def test_permuting_tokens_permutes_outputs_when_nothing_drops(cls, config):
    x, order = np.asarray(normal(13, T, D)), np.random.default_rng(1).permutation(T)
    y, _ = moved(cls, config, True, bank(), x, decision(RAGGED))
    z, _ = moved(cls, config, True, bank(), x[order], decision(RAGGED[order], GATES[order]))
    close(z, np.asarray(y)[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls, config", BOTH)
def test_float64_stays_exact(cls, config):
    with jax.enable_x64(True):
        x = jnp.asarray(RNG.standard_normal((T, D)))
        choice = TokenChoice(jnp.asarray(RAGGED, jnp.int32), jnp.asarray(GATES), E)
        y, _ = moved(cls, config, True, bank(), x, choice)
        assert y.dtype == jnp.float64
        close(y, naive.moe(x, RAGGED, GATES, WEIGHTS), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cls, config", BOTH)
def test_low_precision_rows_stay_low_precision(cls, config):
    x = normal(14, T, D).astype(jnp.bfloat16)
    y, _ = moved(cls, config, True, bank(), x, decision(RAGGED))
    assert y.dtype == jnp.bfloat16
    close(y.astype(jnp.float32), naive.moe(x, RAGGED, GATES, WEIGHTS), rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    "config", [CapacityConfig(0.0), CapacityConfig(1.0, eval_capacity_factor=-1.0), DroplessConfig(row_budget=0.0)]
)
def test_impossible_settings_are_refused(config):
    with pytest.raises(ConfigError, match=r"model\.dispatch\..*> 0"):
        config.validate("model.dispatch")
