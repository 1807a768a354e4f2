"""Models that an example may leave behind any layer: probabilities, losses, rules of leaving, what is not run."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import normal, softmax

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build
from moe_zoo.data.chase import Pointers, PointersConfig
from moe_zoo.layers.exits import divergence, exit_pdf, geometric
from moe_zoo.models.ponder import Ponder, PonderConfig
from moe_zoo.sharding import MeshConfig, batch_sharding, make_mesh, sharding_of
from moe_zoo.train.config import load_config
from moe_zoo.train.ponder import PonderLoss, PonderLossConfig
from moe_zoo.train.step import Trainer

B, S, L, C = 8, 6, 4, 5
TINY = dict(
    vocab_size=12, seq_len=S, hidden_size=8, num_attention_heads=2, intermediate_size=12, num_hidden_layers=L,
    num_classes=C,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(1, 12, (B, S)).astype(np.int32)
TOKENS[3, 4:] = 0


def made(**settings) -> Ponder:
    """A model whose examples leave behind different layers, with different answers."""
    model = P.materialize(Ponder(build(PonderConfig, TINY | settings, "model")), 0)
    values = {n: a * 3 if n.startswith("block.") and a.ndim > 2 else a for n, a in P.arrays(model).items()}
    for i, name in enumerate(("halt.kernel", "head.kernel")):
        values[name] = normal(i, *values[name].shape, scale=1.5)
    return P.replace(model, values | {"halt.bias": jnp.full(1, -1.5)})


all_layers = jax.jit(lambda model, tokens: model.all_layers(tokens))
answer = jax.jit(lambda model, tokens, valid, key: model.answer(tokens, valid, key))


def pdf_by_loop(halt_BL, tail, eps):
    p, passed = np.zeros_like(halt_BL), np.zeros(halt_BL.shape, bool)
    for b, row in enumerate(halt_BL):
        for i, halt in enumerate(row):
            p[b, i] = halt * math.prod(1 - row[:i])
            if tail == "last" and i == L - 1:
                p[b, i] = math.prod(1 - row[:i])
            if tail == "released" and p[b, :i].sum() > 1 - eps:
                p[b, i], passed[b, i] = eps / L, True
    return p, passed


@pytest.mark.parametrize("tail", ["last", "open", "released"])
def test_probabilities_are_those_of_the_loop_and_add_up_as_they_should(tail):
    halt = np.random.default_rng(1).uniform(0.2, 0.95, (20, L))
    p, passed = exit_pdf(jnp.asarray(halt, jnp.float32), tail, 0.1)
    expected, done = pdf_by_loop(halt, tail, 0.1)
    np.testing.assert_allclose(p, expected, rtol=1e-5)
    np.testing.assert_array_equal(passed, done)
    total = {"last": np.ones(20), "open": 1 - np.prod(1 - halt, 1), "released": expected.sum(1)}[tail]
    np.testing.assert_allclose(p.sum(1), total, rtol=1e-5)
    assert passed.any() == (tail == "released") and not passed.all(1).any()
    if tail == "released":  # a constant has no gradient
        slope = jax.grad(lambda halt: exit_pdf(halt, tail, 0.1)[0][passed].sum())(jnp.asarray(halt, jnp.float32))
        assert not slope.any()


def test_the_prior_diverges_from_nothing_but_other_probabilities():
    prior = geometric(0.1, 12)
    assert prior.sum() == pytest.approx(1) and (prior * np.arange(1, 13)).sum() == pytest.approx(7.176, abs=1e-3)
    p, _ = exit_pdf(jnp.full((1, 12), 0.1), "last")
    other = np.full((1, 12), 1 / 12)
    for direction, by_hand in (
        ("prior_to_exit", prior * np.log(prior * 12)),
        ("exit_to_prior", np.log(1 / 12 / prior) / 12),
    ):
        np.testing.assert_allclose(divergence(p, prior, direction), 0, atol=1e-6)
        np.testing.assert_allclose(divergence(jnp.asarray(other), prior, direction)[0], by_hand.sum(), rtol=1e-4)
    never = jnp.zeros((1, 12)).at[0, -1].set(1.0)
    assert divergence(never, prior, "prior_to_exit") > 30 > 3 > divergence(never, prior, "exit_to_prior")


def left_by_loop(halt_LB, logits_LBC, exit, quantile=0.5, depth=None, patience=2, draws=None):
    """(logits, depth) example by example."""
    answers, depths = [], []
    for b in range(B):
        alive, total, mixed, agreed = 1.0, 0.0, np.zeros(C), 0
        for i in range(L):
            halt, z = float(halt_LB[i, b]), np.asarray(logits_LBC[i, b], np.float64)
            p = halt * alive
            total, agreed = total + p, agreed + 1 if i and z.argmax() == logits_LBC[i - 1, b].argmax() else 0
            mixed += {L - 1: 1 - p if exit == "released_expectation" else alive}.get(i, p) * softmax(z)
            alive *= 1 - halt
            rule = {"quantile": total > quantile, "fixed": i + 1 == depth, "patience": agreed >= patience}
            if rule.get(exit, exit == "sample" and draws[i, b] < halt) or i == L - 1:
                answers.append(np.log(mixed) if exit.endswith("expectation") else z)
                depths.append(i + 1)
                break
    return np.array(answers), np.array(depths)


RULES = [
    dict(exit="quantile"), dict(exit="fixed", depth=2), dict(exit="patience", patience=1), dict(exit="expectation"),
    dict(exit="released_expectation"), dict(exit="sample"),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["exit"])
def test_examples_leave_where_the_loop_says_and_the_deepest_one_ends_it(rule):
    model, key, valid = made(), jax.random.key(3), jnp.ones(B, bool)
    halt, logits = map(np.asarray, all_layers(model, TOKENS))
    draws = np.stack([jax.random.uniform(jax.random.fold_in(key, i + 1), (B,)) for i in range(L)])
    expected, depths = left_by_loop(halt, logits, **rule, draws=draws)
    found, depth, run = answer(model.leaving_by(**rule), TOKENS, valid, key)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(depth, depths)
    assert run == depths.max() and (
        rule["exit"] in ("fixed", "expectation", "released_expectation") or depths.std() > 0
    )


def test_a_higher_quantile_is_deeper_from_the_first_layer_to_the_last():
    model, depths = made(), []
    halt, logits = map(np.asarray, all_layers(model, TOKENS))
    for quantile in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        depths.append(left_by_loop(halt, logits, "quantile", quantile)[1])
    for quantile, depth in ((0.0, depths[0]), (0.8, depths[4]), (1.0, depths[5])):
        np.testing.assert_array_equal(
            answer(model.leaving_by(quantile=quantile), TOKENS, jnp.ones(B, bool), None)[1], depth
        )
    assert (np.diff(depths, axis=0) >= 0).all() and (depths[0] == 1).all() and (depths[5] == L).all()


def test_layers_behind_the_last_exit_are_not_run_and_padded_rows_wait_for_nobody():
    """Weights that are not numbers go unnoticed in layers that do not run."""
    model = made(share_layers=False)
    halt, logits = map(np.asarray, all_layers(model, TOKENS))
    _, depths = left_by_loop(halt, logits, "quantile")
    early = depths < depths.max()
    values = P.arrays(model)
    broken = {n: a.at[depths[early].max() :].set(jnp.nan) for n, a in values.items() if n.startswith("block.")}
    found, depth, run = answer(P.replace(model, values | broken), TOKENS, jnp.asarray(early), None)
    assert run == depths[early].max() < depths.max() and np.isfinite(found[early]).all()
    np.testing.assert_array_equal(depth[early], depths[early])


def test_padding_changes_nothing_and_the_first_token_sees_all_others():
    model = made()
    whole, short = (np.asarray(all_layers(model, TOKENS[:, :n])[1]) for n in (S, 4))
    np.testing.assert_allclose(short[:, 3], whole[:, 3], rtol=1e-4, atol=1e-5)
    assert np.abs(short - whole)[:, :3].max() > 1e-3


def batch(labels=None):
    labels = np.arange(B, dtype=np.int32) % C if labels is None else labels
    return {"tokens": TOKENS, "labels": labels, "loss_weights": np.full(B, 1 / B, np.float32)}


def loss_of(model, config, given):
    objective = PonderLoss(PonderLossConfig(**config))
    loss, stats = objective.loss(model, given, {}, step=None, key=None, fraction=1.0)
    return loss, {name: stat.value() for name, stat in stats["scalars"].items()}


@pytest.mark.parametrize("config, settings", [
    ({}, {"eps": 0.4}),
    ({"direction": "exit_to_prior", "beta": 2.0, "prior": 0.3}, {"tail": "last"}),
    ({"weights": "depth"}, {}),
])  # fmt: skip
def test_loss_is_that_of_the_loop(config, settings):
    model = made(**settings)
    # far enough that all have passed before the last layer
    model = P.replace(model, P.arrays(model) | {"halt.bias": jnp.full(1, 0.5)})
    halt, logits = (np.asarray(a, np.float64) for a in all_layers(model, TOKENS))
    p, passed = pdf_by_loop(halt.T, model.config.tail, model.config.eps)
    c, prior, total, kl = PonderLossConfig(**config), geometric(config.get("prior", 0.1), L), 0.0, 0.0
    for b in range(B):
        nll = [-np.log(softmax(logits[i, b])[b % C]) for i in range(L)]
        kept = [not passed[:, i].all() for i in range(L)]
        share = [(i + 1) / 10 for i in range(L)] if c.weights == "depth" else p[b] * kept
        total += np.dot(share, nll) / B
        pair = (prior, p[b]) if c.direction == "prior_to_exit" else (p[b], prior)
        kl += np.sum(pair[0] * np.log(pair[0] / pair[1])) / B
    loss, scalars = jax.jit(lambda model, given: loss_of(model, config, given))(model, batch())
    assert scalars["loss"] == pytest.approx(total, rel=1e-4) and scalars["divergence"] == pytest.approx(kl, rel=1e-4)
    assert loss == pytest.approx(total + (0 if c.weights == "depth" else c.beta * kl), rel=1e-4)
    assert settings.get("eps") is None or (not all(kept) and kept[1])


def test_gradients_reach_the_encoder_through_leaving_unless_detached_and_a_sure_exit_is_the_plain_model():
    for detach in (False, True):
        model = made(detach_lambda=detach, tail="last", lambda_layers=2, num_hidden_layers=2)
        kl = lambda model: loss_of(model, {"beta": 1.0}, batch())[1]["divergence"]
        found = P.arrays(jax.jit(jax.grad(kl, allow_int=True))(model))
        assert all(np.abs(found[name]).max() > 1e-4 for name in ("halt.kernel", "hidden.0.kernel"))
        assert not found["head.kernel"].any()
        encoder = [np.abs(a).max() for n, a in found.items() if n.startswith(("block", "pool", "embed", "norm"))]
        assert max(encoder) == 0 if detach else min(m for m in encoder if m) > 0 and max(encoder) > 1e-4
    never = P.arrays(model) | {"halt.bias": jnp.full(1, -60.0)}
    model = P.replace(model, never)
    plain = -jax.nn.log_softmax(all_layers(model, TOKENS)[1][-1])[np.arange(B), np.arange(B) % C].mean()
    assert loss_of(model, {"beta": 0.0}, batch())[0] == pytest.approx(float(plain), rel=1e-5)


def test_on_a_mesh_loss_gradients_and_answers_are_those_of_one_device():
    model = made(share_layers=False)

    @jax.jit
    def run(model, given):
        loss = lambda model: loss_of(model, {}, given)[0]
        return jax.value_and_grad(loss, allow_int=True)(model), model.answer(given["tokens"], jnp.ones(B, bool))

    alone = jax.device_get(run(model, batch()))
    mesh, variables = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), P.flat(model)
    place = lambda n, a: jax.device_put(a, sharding_of(mesh, variables[n].logical_axes, a.shape, n))
    placed = P.replace(model, {n: place(n, a) for n, a in P.arrays(model).items()})
    many = run(placed, jax.device_put(batch(), batch_sharding(mesh)))
    for expected, found in zip(jax.tree.leaves(alone), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_pointers_lead_where_they_lead():
    config = PointersConfig(places=6, most=4, examples=500)
    data = Pointers(config).load()
    for tokens, label in zip(data.fields["tokens"], data.labels, strict=True):
        steps, at = np.divmod(tokens[0] - 1, 6)
        table = dict(np.divmod(token - 25, 6) for token in tokens[1:])
        assert list(table) == list(range(6)) and all(place != following for place, following in table.items())
        for _ in range(steps + 1):
            at = table[at]
        assert at == label
    tokens = data.fields["tokens"]
    assert set(config.steps(tokens)) == {1, 2, 3, 4} and tokens.max() == 59 == config.vocab_size - 2
    assert tokens.shape == (500, config.length)


def test_the_tiny_config_trains_in_one_compilation():
    config = load_config("configs/encoder/palbert.py:tiny")
    data = config.data.source.make().load()
    config.model.check_examples(data)
    trainer = Trainer(config, make_mesh(devices=jax.devices()[:1]), config.train.objective.make())
    state, losses = trainer.init_state(), []
    for _ in range(10):
        state, stats = trainer.train_step(state, data.rows(np.arange(config.data.batch_size)), np.float32(0))
        losses.append(float(stats["scalars"]["loss"]))
    assert losses[-1] < losses[0] - 0.1 and trainer.train_step._cache_size() == 1, losses
    assert stats["layers"]["block"]["left"].value().shape == (config.model.num_hidden_layers,)


@pytest.mark.parametrize("settings, words", [
    ({"hidden_size": 9}, "hidden_size: 9"),
    ({"exit": "fixed"}, "depth: None.*from 1 to num_hidden_layers=4"),
    ({"depth": 5}, "depth: 5"),
    ({"exit": "median"}, "exit.*median"),
])  # fmt: skip
def test_what_cannot_be_is_refused_by_name(settings, words):
    with pytest.raises(ConfigError, match=words):
        build(PonderConfig, TINY | settings, "model")
