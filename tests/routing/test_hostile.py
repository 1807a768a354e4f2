"""The exact invariants of the routers that strain the types, one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_zoo
from moe_zoo.core import param as P
from moe_zoo.core.aux import Stat
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.decision import Dense
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build
from moe_zoo.dispatch.dropless import Dropless, DroplessConfig
from moe_zoo.models import Decoder, ModelConfig
from moe_zoo.models.decoder import ModelAux
from moe_zoo.routing import ROUTERS
from moe_zoo.routing.expert_choice import ExpertChoice, ExpertChoiceConfig
from moe_zoo.routing.hashed import Hashed, HashedConfig, balanced_table
from moe_zoo.routing.recurrent import GRU, Recurrent, RecurrentConfig
from moe_zoo.routing.relu import ReLU, ReLUConfig, penalty
from moe_zoo.routing.router import Dims
from moe_zoo.routing.smoe_dropout import SMoEDropout, SMoEDropoutConfig
from moe_zoo.routing.soft import Soft, SoftConfig
from moe_zoo.sharding import make_mesh
from moe_zoo.train.adaptive_sparsity import AdaptiveSparsity, AdaptiveSparsityConfig
from moe_zoo.train.config import load_config
from moe_zoo.train.scheduled_loss import ScheduledLoss, ScheduledLossConfig
from moe_zoo.train.step import Trainer

B, S, D, E = 2, 8, 12, 4
T = B * S
DIMS = Dims(E, D, 50)
X = jnp.asarray(np.random.default_rng(0).standard_normal((T, D)), jnp.float32)


def context(**changes):
    return RoutingContext(batch=B, seq=S, **changes)


def made(router, seed=0):
    return P.materialize(router, seed)


# -- RMoE -------------------------------------------------------------------------------------------------------------


def recurrent_model(recurrence="full", layers="3*moe", p=8, **router):
    settings = {
        "vocab_size": 50, "hidden_size": 16, "layers": layers, "num_experts": E, "moe_intermediate_size": 8,
        "intermediate_size": 8, "attention": {"num_attention_heads": 2}, "losses": {},
        "router": {"name": "recurrent", "recurrent_size": p, "recurrence": recurrence, "init_std": 0.5, **router},
    }  # fmt: skip
    return P.materialize(Decoder(build(ModelConfig, settings, "model")), 0)


@functools.cache
def ids():
    return np.random.default_rng(3).integers(0, 50, (2, 8)).astype(np.int32)


def test_gru_equals_a_loop_in_numpy():
    cell, p = made(GRU(5)), 5
    u, h = (np.random.default_rng(i).standard_normal((3, p)) for i in (1, 2))
    w_in, w_state = np.asarray(cell.w_in[...], float), np.asarray(cell.w_state[...], float)
    b_in, b_state = np.full((3, p), 0.3), np.full((3, p), -0.2)
    cell = P.replace(cell, {**P.arrays(cell), "b_in": jnp.asarray(b_in), "b_state": jnp.asarray(b_state)})
    expected = np.zeros((3, p))
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    for t in range(3):
        a = [u[t] @ w_in[:, g] + b_in[g] for g in range(3)]
        b = [h[t] @ w_state[:, g] + b_state[g] for g in range(3)]
        reset, update = sigmoid(a[0] + b[0]), sigmoid(a[1] + b[1])
        expected[t] = (1 - update) * np.tanh(a[2] + reset * b[2]) + update * h[t]
    np.testing.assert_allclose(cell(jnp.asarray(u), jnp.asarray(h)), expected, atol=1e-5)


@pytest.mark.parametrize("recurrence, flows", [("full", True), ("none", False), ("detached", False)])
def test_gradient_reaches_the_first_projection_through_the_state(recurrence, flows):
    """Two routers in a row on fixed tokens: only the carried state links the second to the first."""
    config = RecurrentConfig(num_experts_per_tok=2, recurrent_size=8, recurrence=recurrence, init_std=0.5)
    first, second, cell = made(Recurrent(config, DIMS), 1), made(Recurrent(config, DIMS), 2), made(GRU(8), 3)

    def gates(project):
        changed = P.replace(first, {**P.arrays(first), "project": project})
        carry = changed(X, context(carry=first.init_carry(T), shared=cell)).carry
        return (second(X, context(carry=carry, shared=cell)).decision.gates[:, 0] ** 2).sum()

    gradient = jax.grad(gates)(first.project[...])
    assert (float(jnp.abs(gradient).max()) > 0) == flows


def test_one_layer_of_rmoe_equals_its_ablation_without_recurrence():
    np.testing.assert_array_equal(*(recurrent_model(r, "1*moe")(ids())[0] for r in ("full", "none")))


def test_dense_layers_leave_the_state_alone_and_the_cell_is_shared():
    model = recurrent_model(layers="1*moe 1*dense 1*moe")
    shared = {n: v.get_value().size for n, v in P.flat(model).items() if n.startswith("shared.")}
    p, L = 8, 2
    own = sum(v.get_value().size for n, v in P.flat(model).items() if ".router." in n)
    assert sum(shared.values()) == 6 * p * p + 6 * p and own == L * (16 * p + p * E)
    assert bool(jnp.isfinite(model(ids())[0]).all())


# -- expert choice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["batch", "sequence"])
def test_every_expert_takes_exactly_its_best_tokens(group):
    router = made(ExpertChoice(ExpertChoiceConfig(capacity_factor=1.5, group=group, init_std=1.0), DIMS))
    routing = router(X, context())
    G = B if group == "sequence" else 1
    C = int(np.ceil(1.5 * (T // G) / E))
    assert routing.decision.tokens.shape == (G, E, C)
    probs = np.asarray(routing.probs).reshape(G, T // G, E)
    for g in range(G):
        for e in range(E):
            best = np.argsort(-probs[g, :, e], kind="stable")[:C]
            assert set(np.asarray(routing.decision.tokens[g, e])) == set(best)
            np.testing.assert_allclose(np.sort(routing.decision.gates[g, e]), np.sort(probs[g, best, e]), rtol=1e-6)


def test_capacity_is_not_rounded_up_by_the_error_of_a_product():
    """1.1 * 100 / 10 is 11 and a little more in floating point."""
    router = made(ExpertChoice(ExpertChoiceConfig(capacity_factor=1.1), Dims(10, D, 50)))
    x = jnp.ones((100, D))
    assert router(x, RoutingContext(batch=1, seq=100)).decision.tokens.shape == (1, 10, 11)


def test_padding_is_never_chosen_and_coverage_counts_valid_tokens():
    router = made(ExpertChoice(ExpertChoiceConfig(capacity_factor=4.0), DIMS))
    valid = (np.arange(T) % S) < 3
    routing = router(X, context(valid=jnp.asarray(valid)))
    tokens = np.asarray(routing.decision.tokens)
    assert set(tokens[tokens < S]) <= {0, 1, 2} and (tokens == S).any()
    assert float(routing.aux.stats["coverage"].value()) == 1.0


# -- ReMoE ------------------------------------------------------------------------------------------------------------


def test_penalty_weighs_by_load_and_is_the_plain_norm_at_even_load():
    gates = jnp.asarray([[1.0, 0, 0, 2], [0, 3, 0, 1], [0, 0, 5, 0], [2, 0, 0, 0]])
    loads = np.array([2, 1, 1, 2]) * E / (1.5 * 4)
    assert float(penalty(gates, None, 1.5, True)) == pytest.approx(float((loads * np.asarray(gates).sum(0)).sum() / 4))
    even = jnp.eye(4) * jnp.asarray([1.0, 2, 3, 4])
    assert float(penalty(even, None, 1.0, True)) == pytest.approx(float(penalty(even, None, 1.0, False)))


def test_coefficient_grows_by_its_factor_exactly_while_too_many_experts_are_active():
    objective = AdaptiveSparsity(AdaptiveSparsityConfig(initial=1e-3, factor=1.2))
    stats = lambda active: {
        "layers": {
            "a": {
                "active_fraction": Stat.average(jnp.float32([active, 0.5])),
                "target_fraction": Stat.average(jnp.float32([0.5, 0.5])),
            }
        }
    }
    move = lambda active: float(objective.update(objective.init_state(), stats(active))["coefficient"])
    assert (
        move(0.7) == pytest.approx(1.2e-3)
        and move(0.3) == pytest.approx(1e-3 / 1.2)
        and move(0.5) == pytest.approx(1e-3)
    )


def test_a_token_without_an_active_expert_gets_zero_and_a_budget_drops_the_smallest():
    router = made(ReLU(ReLUConfig(init_std=1.0), DIMS))
    gates = router(X, context()).decision.gates
    gates = gates.at[3].set(0.0)
    live = int((gates > 0).sum())
    dispatcher = Dropless(DroplessConfig(row_budget=1.0))
    choice, R = dispatcher.within_budget(Dense(gates).top(E))
    assert R == T < live
    kept = np.asarray(choice.dense().gates)
    assert (kept != 0).sum() == R and not kept[3].any()
    assert kept[kept > 0].min() >= np.asarray(gates)[(np.asarray(gates) > 0) & (kept == 0)].max()


# -- BlockFFN ---------------------------------------------------------------------------------------------------------


def test_scheduled_coefficient_follows_windows_of_the_loss():
    """Against the schedule in plain Python: windows, ratio, least growth, cap, linear way to the new value."""
    start, every, growth, cap = 12, 4, 1.025, 4.0
    losses = 2.0 ** np.interp(np.arange(60), [0, 30, 59], [0, -1, 3]) * np.random.default_rng(0).uniform(0.9, 1.1, 60)
    objective = ScheduledLoss(ScheduledLossConfig(start=start, every=every, growth=growth, cap=cap))
    state, scales = objective.init_state(), []
    update = jax.jit(objective.update)
    for loss in losses:  # two layers whose mean is the loss
        scales.append(float(state["scale"]))
        layers = {"a": {"chunk_sparsity": Stat.average(jnp.float32([loss - 0.1, loss + 0.1]))}, "dense": {}}
        state = update(state, {"layers": layers})
    expected, value, goal, previous = [], 1.0, 1.0, None
    for first in range(0, 60, every):  # the value is linear over a window, from where it was to the goal
        expected += [value + (goal - value) * (i / every) for i in range(1, every + 1)]
        value, mean = goal, losses[first : first + every].mean()
        if first + every >= start:
            q = mean / previous
            goal = min(cap, value * (max(q, growth) if q > 1 else q))
        previous = mean
    np.testing.assert_allclose(scales, expected, rtol=1e-5)
    assert max(scales) == cap and min(scales) < 0.9


def test_scheduled_loss_scales_only_its_own_loss():
    objective = ScheduledLoss(ScheduledLossConfig())
    aux = ModelAux({"chunk_sparsity": jnp.float32(0.5), "locality": jnp.float32(7.0)}, {})
    extra, stats = objective.extra(aux, objective.init_state() | {"scale": jnp.float32(3)})
    assert float(extra + aux.total_loss()) == 3 * 0.5 + 7
    assert float(stats["chunk_sparsity_scale"].value()) == 3
    with pytest.raises(ConfigError, match="schedules 'chunk_sparsity', model.losses has: locality"):
        objective.extra(ModelAux({"locality": jnp.float32(7.0)}, {}), objective.init_state())


# -- Soft MoE ---------------------------------------------------------------------------------------------------------


def test_slots_and_tokens_are_convex_mixtures_and_length_does_not_matter():
    router = made(Soft(SoftConfig(slots_per_expert=3), DIMS))
    decision = router(X, context()).decision
    np.testing.assert_allclose(decision.dispatch.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(decision.combine.sum((2, 3)), 1, atol=1e-5)
    longer = router(10 * X, context()).decision
    np.testing.assert_allclose(longer.combine, decision.combine, atol=1e-4)
    order = np.random.default_rng(0).permutation(S)
    moved = router(X.reshape(B, S, D)[:, order].reshape(T, D), context()).decision
    np.testing.assert_allclose(moved.combine, decision.combine[:, order], atol=1e-5)


# -- SMoE-Dropout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low,high,total", [(2, 12, 1000), (8, 16, 1000), (3, 4, 2), (1, 16, 997), (5, 5, 7)])
def test_number_of_experts_rounds_halves_to_even_at_every_step(low, high, total):
    """Step 650 of 1000 from 2 to 12 is 6.5 on the way, which rounds to 6 and in float32 products to 7."""
    router = made(SMoEDropout(SMoEDropoutConfig(k_min=low, k_max=high, total_steps=total), Dims(16, D, 50)))
    steps = np.arange(total + 3)
    got = jax.vmap(lambda step: router.k(context(train=True, step=step)))(jnp.asarray(steps, jnp.int32))
    expected = [low + round((high - low) * min(int(step), total) / total) for step in steps]
    np.testing.assert_array_equal(got, expected)


def test_number_of_experts_follows_the_step_and_sets_are_nested():
    router = made(SMoEDropout(SMoEDropoutConfig(k_min=1, k_max=4, total_steps=6, init_std=1.0), DIMS))
    call = jax.jit(lambda step: router(X, context(train=True, step=step)))
    chosen = []
    for step in range(9):
        routing = call(jnp.int32(step))
        k = min(4, round(3 * min(step / 6, 1)) + 1)
        np.testing.assert_array_equal(routing.decision.live().sum(-1), k)
        np.testing.assert_allclose(routing.decision.gates.sum(-1), 1, atol=1e-6)
        chosen.append([set(row[row < E]) for row in np.asarray(routing.decision.experts)])
    assert call._cache_size() == 1
    for earlier, later in zip(chosen, chosen[1:]):
        assert all(a <= b for a, b in zip(earlier, later))


def test_gradient_flows_through_the_gates_into_x():
    router = made(SMoEDropout(SMoEDropoutConfig(init_std=1.0), DIMS))
    gradient = jax.grad(lambda x: (router(x, context()).decision.gates[:, 0] ** 2).sum())(X)
    assert float(jnp.abs(gradient).min(0).max()) > 0
    assert all(isinstance(v, P.Frozen) for v in P.flat(router).values())


# -- hash layers ------------------------------------------------------------------------------------------------------


def test_expert_follows_the_token_id_alone_and_tables_are_even():
    router = made(Hashed(HashedConfig(), DIMS))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 50, T), jnp.int32)
    routing = router(X, context(token_ids=tokens))
    np.testing.assert_array_equal(routing.decision.experts[:, 0], np.asarray(router.table[...])[tokens])
    np.testing.assert_array_equal(routing.decision.gates, 1)
    load = np.bincount(np.asarray(router.table[...]), minlength=E)
    assert load.max() - load.min() <= 1
    modulo = made(Hashed(HashedConfig(table="modulo"), DIMS))
    np.testing.assert_array_equal(modulo.table[...], np.arange(50) % E)


def test_balanced_table_is_even_within_one_token_frequency():
    counts = np.sort((1e4 / np.arange(1, 51)).astype(int))
    load = np.zeros(E)
    np.add.at(load, balanced_table(counts, E), counts)
    assert load.max() - load.min() <= counts.max()


def test_balanced_table_is_counted_on_the_training_data_when_a_run_starts():
    config = load_config("hash:tiny", [])
    trainer = Trainer(config, make_mesh(devices=jax.devices()[:1]), config.train.objective.make())
    counts = np.random.default_rng(0).integers(0, 1000, config.model.vocab_size)
    state, blank = trainer.init_state(counts), trainer.init_state()
    for layer in state["frozen"]["segments.0.blocks.0.ffn.router.table"]:
        np.testing.assert_array_equal(layer, balanced_table(counts, config.model.num_experts))
    assert (blank["frozen"]["segments.0.blocks.0.ffn.router.table"] == config.model.num_experts).all()
    for path, value in blank["trainable"].items():
        np.testing.assert_array_equal(value, state["trainable"][path])


# -- the registry -----------------------------------------------------------------------------------------------------


def test_routers_are_listed_with_a_line_and_an_unknown_name_answers_with_the_nearest():
    lines = moe_zoo.routers()
    assert set(lines) == set(ROUTERS.names()) and all(20 < len(line) < 130 for line in lines.values())
    with pytest.raises(ConfigError, match="'expert_choise'.*did you mean 'expert_choice'"):
        ROUTERS.get("expert_choise")
