"""GLIDER: the term for the whole sequence, its limits, and how an instruction reaches the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_adapter_contract import BASE, IDS, adapted, base, trained
from test_adapter_entries import CTX, changed, make, run

from moe_zoo.adapters.glider import GliderConfig, Likeness
from moe_zoo.adapters.instructions import embed
from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build, overlay, to_dict
from moe_zoo.inference import Loaded, generate
from moe_zoo.models import Decoder, ModelConfig
from moe_zoo.transform import describe_experts, merge

TASKS = ["translate the text to French", "reverse the letters of a word", "how long is the word"]
E, M = 3, 64


def likeness(embeddings=None, **settings) -> Likeness:
    made = P.materialize(Likeness(GliderConfig(num_experts=E, embedding_size=M, **settings)), 0)
    return P.replace(made, {"embeddings": jnp.asarray(embed(TASKS, M) if embeddings is None else embeddings)})


def layer(**settings):
    return make(name="glider", num_experts=E, num_experts_per_tok=2, **settings)


def told(bias_BE) -> "CTX":
    return CTX.replace(shared={"adapters": None if bias_BE is None else jnp.asarray(bias_BE, jnp.float32)})


def test_without_the_global_term_it_is_phatgoose_bit_for_bit():
    adapter, x, y, w = layer()
    goose = make(name="phatgoose", stage="route", num_experts=E, num_experts_per_tok=2)[0]
    goose = P.replace(goose, P.arrays(adapter))
    expected, aux = run(goose, x, y, w)
    nothing = likeness(kappa=0.0).first(jnp.asarray(embed(["spell the word", TASKS[1]], M)))
    assert nothing.shape == (2, E)
    for bias in (None, nothing):
        got, mine = run(adapter, x, y, w, told(bias))
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(mine.stats["load"].total, aux.stats["load"].total)
    # as much for every expert is nothing
    np.testing.assert_allclose(run(adapter, x, y, w, told(np.full((2, E), 3.0)))[0], expected, atol=1e-5)


def test_far_from_zero_it_is_one_expert_for_each_sequence():
    adapter, x, y, w = layer()
    chosen = [2, 0]
    bias = likeness(kappa=1e4).first(jnp.asarray(embed([TASKS[e] for e in chosen], M)))
    got, _ = run(adapter, x, y, w, told(bias))
    alone = [np.asarray(x @ adapter.merged(w, jnp.eye(E)[e])) for e in chosen]
    expected = np.concatenate([alone[0][:3], alone[1][3:]])  # two sequences of three tokens
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(alone[0] - alone[1]).max() > 0.1


def test_experts_may_be_listed_in_any_order():
    adapter, x, y, w = layer()
    order = np.array([2, 0, 1])
    bias = np.array([[0.5, -0.2, 0.1], [0.0, 1.0, 0.3]])
    values = {n: np.asarray(a) for n, a in P.arrays(adapter).items()}
    other = changed(adapter, router=values["router"][:, order], **{n: values[n][order] for n in ("a", "b", "scale")})
    one, aux = run(adapter, x, y, w, told(bias))
    two, _ = run(other, x, y, w, told(bias[:, order]))
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(aux.stats["load"].total.sum(), 6, rtol=1e-5)
    assert aux.stats["experts_per_token"].value() == 2


def test_kappa_is_large_where_the_task_is_known():
    settings = {"gamma": 10.0, "threshold": 0.6, "beta": 2.0}
    axes = np.eye(E, M, dtype=np.float32)
    angles = np.array([0.61, 0.59, 0.0])  # cosines with the first expert; of the rest nothing
    query = np.zeros((3, M), np.float32)
    query[:, 0], query[:, 5] = angles, np.sqrt(1 - angles**2)
    got = np.asarray(likeness(axes, **settings).first(jnp.asarray(7 * query)))
    np.testing.assert_allclose(got[:, 0], [12 * 0.61, 2 * 0.59, 0.0], rtol=1e-5)
    assert not got[:, 1:].any()
    np.testing.assert_allclose(likeness(axes, kappa=4.0, **settings).first(jnp.asarray(query))[:, 0], 4 * angles)


def test_texts_with_words_in_common_are_alike():
    vectors = embed([*TASKS, "reverse the letters of each word", "  Reverse the\nletters of each WORD "], 512)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(vectors[3], vectors[4])
    near = vectors[:3] @ vectors[3]
    assert near.argmax() == 1 and near[1] > 0.7 and near[[0, 2]].max() < 0.5
    with pytest.raises(ValueError, match="an empty instruction"):
        embed([" \n"], 8)


def test_an_instruction_reaches_every_layer_and_every_decoded_token():
    settings = to_dict(adapted("glider").config)
    config = build(ModelConfig, overlay(settings, {"adapters": {"name": "glider", "kappa": 1e4}}), "model")
    values = {n: jnp.asarray(v) for n, v in trained("glider").items()}
    blank = Loaded(P.replace(Decoder(config), values | {"adapters.embeddings": jnp.zeros((3, 8))}), config, None)
    with pytest.raises(ValueError, match="what the experts are for is not known; see transform.describe_experts"):
        blank(IDS, instructions=TASKS[0])
    made = describe_experts(blank, np.eye(3, 8, dtype=np.float32))
    asked = np.eye(3, 8, dtype=np.float32)[[2, 0]]
    logits = np.asarray(made(IDS, instructions=asked).logits)
    forward = jax.jit(lambda model: model(IDS)[0])
    for row, e in enumerate([2, 0]):
        alone = forward(merge(made, np.eye(3)[e]).model)[row]
        np.testing.assert_allclose(logits[row], alone, atol=2e-4)
    assert np.abs(np.asarray(made(IDS, instructions=asked[::-1]).logits) - logits).max() > 1e-2
    prompts = [IDS[0, :3], IDS[1, :3]]
    new = generate(made.model, prompts, 4, temperature=0.0, instructions=asked)
    texts = np.stack([np.concatenate(pair) for pair in zip(prompts, new)])
    padded = np.pad(texts, [(0, 0), (0, IDS.shape[1] - texts.shape[1])])
    best = np.asarray(made(padded, instructions=asked).logits).argmax(-1)
    np.testing.assert_array_equal(best[:, 2:6], texts[:, 3:])


def test_what_is_wrong_with_instructions_is_named():
    made = Loaded(adapted("glider"), adapted("glider").config, None)
    with pytest.raises(ConfigError, match="expected instructions for 3 experts, or embeddings .3, 8.; got .2, 8."):
        describe_experts(made, TASKS[:2])
    described = describe_experts(made, TASKS)
    np.testing.assert_array_equal(P.arrays(described.model)["adapters.embeddings"], embed(TASKS, 8))
    assert not np.asarray(P.arrays(made.model)["adapters.embeddings"]).any()
    with pytest.raises(ValueError, match="expected one for each of 2 sequences, .* of 8 numbers; got .3, 8."):
        described(IDS, instructions=TASKS)
    plain = Loaded(base(), BASE, None)
    with pytest.raises(ValueError, match="no adapters that route by them, such as 'glider'"):
        generate(plain.model, [IDS[0]], 1, instructions="count")
    with pytest.raises(ValueError, match="adapters 'none' look at none"):
        base()(IDS, instructions=np.zeros((2, 8)))
    with pytest.raises(ConfigError, match="describe_experts: expected adapters 'glider', got 'none'"):
        describe_experts(plain, TASKS)
    with pytest.raises(ConfigError, match="kappa: expected a number >= 0, got -1"):
        GliderConfig(kappa=-1.0).validate("adapters")
