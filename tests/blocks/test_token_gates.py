"""Gates of single tokens over a grid: against loops, exact invariants, gradients, the budget, static capacities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import normal

from moe_zoo.blocks.token_gates import Gate, GateConfig, Node, fours, opened
from moe_zoo.core import param as P
from moe_zoo.core.aux import Aux
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build
from moe_zoo.layers.grid import GridView
from moe_zoo.models.decoder import ModelAux
from moe_zoo.models.dyn_token_routing import Capacities, DynTokenRoutingConfig, DynTokenRoutingViT
from moe_zoo.train.token_budget import TokenBudget, TokenBudgetConfig

B, S, D = 2, 16, 8
ONE = {"image_size": 16, "hidden_sizes": [8, 8], "num_heads": [2, 2], "stages": 2, "mlp_ratio": 1}
call = jax.jit(lambda model, batch, key: model(batch, key=key, record=True))


def node(kv_all=False, **gate) -> Node:
    made = Node(
        GateConfig(**gate), hidden_size=D, coarse=12, num_heads=2, mlp_ratio=2, kv_all=kv_all, eps=1e-6, out_scale=1.0
    )
    return P.materialize(made, 0)


@functools.cache
def model(**changes) -> DynTokenRoutingViT:
    """With gates that are neither all open nor all closed."""
    kind = changes.pop("kind", "straight_through")
    settings = {**ONE, **changes, "gate": {"kind": kind, "bias": 0.3, "hidden_size": 4}}
    made = P.materialize(DynTokenRoutingViT(build(DynTokenRoutingConfig, settings, "model")), 0)
    wide = {name: 4 * value for name, value in P.arrays(made).items() if name.endswith(("depth.w_out", "scale.w_out"))}
    return P.replace(made, {**P.arrays(made), **wide})


def images(n=4):
    return {"images": np.random.default_rng(1).integers(0, 256, (n, 16, 16, 1)).astype(np.uint8)}


def terms(aux: ModelAux, row: int) -> dict[str, np.ndarray]:
    return aux.terms()[f"rows.{row}"]


@pytest.mark.parametrize("kv_all", [False, True])
def test_a_node_equals_a_loop_over_tokens_and_leaves_closed_ones_as_they_are(kv_all):
    one, x = node(kv_all), np.asarray(normal(1, B, S, D))
    gate = np.array([[0, 1, 0.5, 0] * 4, [0] * 16], np.float32)  # in the second image nobody asks
    out = np.asarray(jax.jit(lambda one, x, gate: one.through(x, gate))(one, x, gate))
    np.testing.assert_array_equal(out[gate == 0], x[gate == 0])
    go = np.flatnonzero(gate[0])
    h = one.mixer_norm(x[0])
    q, k, v = (np.asarray(one.mixer.project(name, h[None])[0], np.float64) for name in "qkv")
    for t in go:
        keys = range(S) if kv_all else go
        o = np.zeros((2, 4))
        for n in range(2):
            scores = np.array([q[t, n] @ k[s, n] for s in keys]) / 2.0
            p = np.exp(scores - scores.max())
            o[n] = sum(share * v[s, n] for share, s in zip(p / p.sum(), keys))
        z = x[0, t] + np.einsum("nh,nhd->d", o, one.mixer.w_o[...]) + one.mixer.b_o[...]
        y = z + one.ffn(one.ffn_norm(z))
        np.testing.assert_allclose(out[0, t], gate[0, t] * y + (1 - gate[0, t]) * x[0, t], atol=1e-5)


def test_with_places_for_all_that_is_open_a_node_is_the_same_and_beyond_them_tokens_pass_by():
    one, x = node(), np.asarray(normal(1, B, S, D))
    gate = np.zeros((B, S), np.float32)
    gate[:, [2, 3, 5, 11]] = [0.9, 0.2, 0.6, 0.7]
    run = jax.jit(lambda one, x, gate, places: one.through(x, gate, places), static_argnums=3)
    np.testing.assert_allclose(run(one, x, gate, 6), run(one, x, gate, None), atol=1e-6)
    two = np.where(np.isin(np.arange(S), [2, 11]), gate, 0)
    np.testing.assert_allclose(run(one, x, gate, 2), run(one, x, two, None), atol=1e-6)
    coarse = fours(x, GridView(4, 4))
    np.testing.assert_array_equal(coarse[0, 1].reshape(4, D), x[0, [2, 3, 6, 7]])  # one square of four
    gate_BU = np.array([[0.5, 0, 1, 0]] * B, np.float32)
    down = one.down(coarse, gate_BU)
    np.testing.assert_allclose(one.down(coarse, gate_BU, 2), down, atol=1e-6)
    assert not np.asarray(down[:, [1, 3]]).any() and np.asarray(down[:, [0, 2]]).all()


def test_both_forms_of_a_gate():
    v = jnp.array([-2.0, -0.1, 0.3, 2.0])
    slope = lambda kind: jax.vmap(jax.grad(lambda v: opened(v, kind)))(v)
    np.testing.assert_allclose(opened(v, "tanh"), np.maximum(np.tanh(v), 0), rtol=1e-6)
    np.testing.assert_allclose(slope("tanh"), np.where(v > 0, 1 - np.tanh(v) ** 2, 0), rtol=1e-5)
    np.testing.assert_array_equal(opened(v, "straight_through"), [0, 0, 1, 1])
    soft = jax.nn.sigmoid(v)
    np.testing.assert_allclose(slope("straight_through"), soft * (1 - soft), rtol=1e-5)


@pytest.mark.parametrize("kind", ["straight_through", "tanh"])
def test_gradients_reach_gates_by_their_form(kind):
    """Straight through, also those of closed tokens move the gate; tanh has none there. Nothing is NaN."""
    one, x = node(kind=kind, bias=-3.0), np.asarray(normal(1, B, S, D))  # all closed
    loss = lambda one: jnp.sin(one.through(x, one.depth(x, 0, None))).sum()
    values = P.arrays(jax.jit(jax.grad(loss))(one))
    assert all(bool(jnp.isfinite(value).all()) for value in values.values())
    assert not np.asarray(values["mixer.w_q"]).any()
    assert bool(np.asarray(values["depth.w_in"]).any()) == (kind == "straight_through")


def test_all_open_is_every_block_on_every_token():
    """Open gates: the block of every node on all tokens, what goes down added at every stage."""
    every, batch = model(kind="open"), images()
    logits, aux = call(every, batch, None)
    assert float(sum(t["cost"].sum() for t in aux.terms().values())) == pytest.approx(
        float(sum(t["full"].sum() for t in aux.terms().values()))
    )

    @jax.jit
    def plain(every, images):
        at = lambda row, j: jax.tree.map(lambda a: a[j], every.rows[row])
        a, b = every.stem(images / 127.5 - 1).reshape(4, 16, 8) + every.position[...], 0.0
        for j in range(2):
            fine, coarse = at(0, j), at(1, j)
            b = b + fine.down_norm(fours(a, GridView(4, 4))) @ fine.w_down[...]
            a, b = (n._block(f, f, jnp.ones(f.shape[:2], bool)) for n, f in ((fine, a), (coarse, b)))
        return every.head(b)

    np.testing.assert_allclose(logits, plain(every, batch["images"].astype(np.float32)), atol=2e-5)
    flops = sum(row["flops"].value().sum() for row in aux.stats.values())
    assert float(flops) + every.fixed_flops() == pytest.approx(every.flops_per_example())


def test_what_the_gates_cost_is_what_is_told_and_rows_that_fill_a_batch_count_nowhere():
    some, batch = model(), images()
    logits, aux = call(some, batch, None)
    depth = terms(aux, 0)["depth_gate"]
    assert 0.1 < float((depth > 0).mean()) < 0.9
    for j in range(2):
        n = (np.asarray(depth[j]) > 0).sum(1)
        # q, o and the feed-forward part of open tokens, k and v of the same, every pair's score and sum
        block = n * (2 * 2 * 64 + 2 * 2 * 64 + 2 * 2 * 64) + n * n * 4 * 8
        down = (np.asarray(terms(aux, 0)["scale_gate"][j]) > 0).sum(1) * 2 * 32 * 8
        gates = 16 * 2 * 4 * (8 + 1) + 4 * 2 * 4 * (8 + 1)
        assert float(aux.stats["rows.0"]["flops"].value()[j]) == pytest.approx((block + down + gates).mean())
    more = {"images": np.concatenate([batch["images"], np.zeros_like(batch["images"])])}
    padded, told = jax.jit(lambda model, batch, valid: model(batch, valid=valid))(some, more, np.arange(8) < 4)
    np.testing.assert_allclose(padded[:4], logits, atol=1e-5)
    for path, stats in aux.stats.items():
        for name, stat in stats.items():
            np.testing.assert_allclose(told.stats[path][name].value(), stat.value(), rtol=1e-5, err_msg=name)


def test_calibrated_capacities_give_the_same_answers_where_they_suffice_and_count_what_they_do_not():
    some, batch = model(), images()
    logits, aux = call(some, batch, None)
    roomy = some.calibrated([batch], kappa=16.0)
    assert roomy.capacities.depth == ((16,) * 2, (4,) * 2)
    again, told = call(roomy, batch, None)
    np.testing.assert_allclose(again, logits, atol=1e-5)
    assert not any(np.asarray(stats["overflow"].value()).any() for stats in told.stats.values())
    tight = some.with_capacities(Capacities(((1,) * 2, (1,) * 2), ((1,) * 2, (0,) * 2)))
    _, told = call(tight, batch, None)
    first = lambda gates: np.maximum((np.asarray(terms(aux, 0)[gates][0]) > 0).sum(1) - 1, 0)
    expected = (first("depth_gate") + first("scale_gate")).mean()
    assert float(told.stats["rows.0"]["overflow"].value()[0]) == pytest.approx(expected) and expected > 1
    assert float(told.stats["rows.0"]["flops"].value()[0]) < float(aux.stats["rows.0"]["flops"].value()[0])
    share = float(aux.stats["rows.0"]["depth_share"].value()[1])
    assert some.calibrated([batch], kappa=1.0).capacities.depth[0][1] == int(np.ceil(round(share * 16, 6)))


def test_early_exit_and_the_controls():
    _, aux = call(model(early_exit=True), images(), None)
    gates = np.asarray(terms(aux, 0)["depth_gate"]) > 0
    assert (gates[1:] <= gates[:-1]).all() and gates[-1].any() < gates.size
    x = np.zeros((64, 16, 8), np.float32)
    ask = lambda kind, j, key=None: np.asarray(Gate(GateConfig(kind=kind), 8, 0.25)(x, j, key))
    assert [ask("static", j).mean() for j in range(4)] == [1, 1, 0, 0]
    assert ask("open", 3).all()
    one, other = (ask("random", 0, jax.random.key(j)) for j in range(2))
    assert abs(one.mean() - 0.25) < 0.05 and (one != other).mean() > 0.3


def test_budget_is_the_formula_with_delay_and_warm_up():
    cost = {"a": (jnp.arange(2), Aux(terms={"cost": jnp.array([3.0, 1.0]), "full": jnp.array([4.0, 4.0])}))}
    cost["b"] = (jnp.arange(1), Aux(terms={"cost": jnp.array([2.0]), "full": jnp.array([2.0])}))
    aux = ModelAux({}, cost)
    objective = TokenBudget(TokenBudgetConfig(share=0.5, weight=2.0, delay_steps=10, warmup_steps=5))
    told = [float(objective.extra(aux, jnp.int32(step))[0]) for step in (0, 9, 10, 12, 14, 99)]
    full = 2.0 * (6 / 10 - 0.5) ** 2
    np.testing.assert_allclose(told, [0, 0, full / 5, full * 3 / 5, full, full], rtol=1e-5)
    assert float(TokenBudget(TokenBudgetConfig(share=0.6)).extra(aux, jnp.int32(999))[0]) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ConfigError, match="for models with gates"):
        objective.extra(ModelAux({}, {}), 0)


@pytest.mark.parametrize(
    "settings, why",
    [
        ({"image_size": 20}, "2 rows need a multiple of 8"),
        ({"num_heads": [2]}, "expected one for each of the 2 rows"),
        ({"gate": {"kind": "static", "static_stages": 3}}, "at most all"),
        ({"gate": {"depth_share": 1.5}}, "a share in"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_impossible_settings_are_named(settings, why):
    with pytest.raises(ConfigError, match=why):
        build(DynTokenRoutingConfig, ONE | settings, "model")
