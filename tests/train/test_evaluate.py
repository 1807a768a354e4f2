"""Load by domain on held-out batches, for every kind of decision: against loops, and through the whole model."""

import jax.numpy as jnp
import numpy as np
import pytest
from naive import tiny_model

from moe_zoo.blocks.moe import visits
from moe_zoo.core.decision import Dense, ExpertChoice, Merge, Soft, TokenChoice
from moe_zoo.data import ByteTokenizer, Document, build_corpus, eval_batches
from moe_zoo.train.evaluate import evaluate, specialization

TOKENIZER = ByteTokenizer()
SETTINGS = dict(seq_len=16, batch_size=4)
E = 4
ROUTERS = {
    "top_k": ({"name": "top_k", "init_std": 0.5}, "everywhere"),
    "expert_choice": ({"name": "expert_choice", "init_std": 0.5}, "slots"),
    "relu": ({"name": "relu", "init_std": 0.5}, "everywhere"),
    "soft": ({"name": "soft", "slots_per_expert": 2}, "slots"),
}


@pytest.fixture(scope="module")
def corpus():
    """Three domains of different sizes and letters, documents shorter and longer than a row."""
    rng = np.random.default_rng(0)
    letters = {"few": "ab", "many": "cdefgh", "digits": "0123456789"}
    documents = [
        Document("".join(rng.choice(list(letters[name]), rng.integers(3, 40))), name)
        for name in ["many"] * 12 + ["few"] * 5 + ["digits"] * 9
    ]
    return build_corpus(documents, TOKENIZER)


@pytest.mark.parametrize(
    "decision",
    [
        TokenChoice(jnp.array([[0, 2], [2, 4], [4, 4], [1, 3], [2, 0], [3, 1]]), jnp.ones((6, 2)), E),
        Dense(jnp.array([[0.5, 0, 0, 2], [0, 0, 0, 0], [-1, 1, 1, 1], [0, 0, 3, 0], [1, 1, 0, 0], [0, 1, 0, 0]])),
        ExpertChoice(
            jnp.array([[[0, 1], [2, 3], [0, 2], [3, 3]], [[1, 0], [1, 3], [2, 1], [3, 0]]]), jnp.ones((2, 4, 2))
        ),
        Soft(jnp.ones((2, 3, 4, 2)), jnp.asarray(np.random.default_rng(0).random((2, 3, 4, 2)), jnp.float32)),
    ],
    ids=lambda decision: type(decision).__name__,
)
def test_visits_of_each_token_against_a_loop(decision):
    expected = np.zeros((6, E))
    if isinstance(decision, TokenChoice):
        for t, experts in enumerate(np.asarray(decision.experts)):
            for e in experts[experts < E]:
                expected[t, e] += 1
    elif isinstance(decision, Dense):
        expected = np.asarray(decision.gates) != 0
    elif isinstance(decision, ExpertChoice):
        for (g, e, _), t in np.ndenumerate(np.asarray(decision.tokens)):
            if t < 3:
                expected[3 * g + t, e] += 1
    else:
        for (g, s, e, _), share in np.ndenumerate(np.asarray(decision.combine)):
            expected[3 * g + s, e] += share
    np.testing.assert_allclose(visits(decision, 6), expected, rtol=1e-6)
    assert visits(Merge(jnp.ones((2, E))), 6) is None


@pytest.mark.parametrize("router", ROUTERS)
def test_load_by_domain_of_every_kind_of_router(corpus, router):
    settings, dispatch = ROUTERS[router]
    model = tiny_model(
        vocab_size=TOKENIZER.vocab_size, layers="1*dense 1*moe", num_experts=E, router=settings,
        dispatch={"name": dispatch}, losses={},
    )  # fmt: skip
    batches = list(eval_batches(corpus, TOKENIZER, **SETTINGS))
    found = specialization(model, batches, corpus.domains)
    tokens = np.array([sum((batch["domain"] == d).sum() for batch in batches) for d in range(3)])
    assert found.domains == corpus.domains and found.layers == (1,) and (found.tokens == tokens).all()
    load_LDE = np.stack(found.load)
    if router == "top_k":
        np.testing.assert_allclose(load_LDE.sum(2), 2 * tokens[None])
        np.testing.assert_allclose(found.experts_per_token, 2)
    elif router == "soft":
        np.testing.assert_allclose(load_LDE.sum(2), tokens[None], rtol=1e-5)
    elif router == "expert_choice":  # full rows give every expert its 8 tokens of 16
        full = sum((batch["segment_ids"] > 0).all(1).sum() for batch in batches)
        assert (load_LDE.sum(1) >= 8 * full).all() and (load_LDE.sum(1) <= 8 * (full + 1)).all()
    else:
        assert (0 < load_LDE.sum(2)).all() and (load_LDE.sum(2) < E * tokens).all()
    # the same text under other names of the domains: the rows go along, and what the expert tells stays
    order = np.array([2, 0, 1])
    renamed = [batch | {"domain": np.where(batch["domain"] < 0, -1, order[batch["domain"]])} for batch in batches]
    again = specialization(model, renamed, corpus.domains)
    np.testing.assert_allclose(np.stack(again.load)[:, order], load_LDE, rtol=1e-6)
    np.testing.assert_allclose(again.bits, found.bits, atol=1e-6)
    # evaluating measures the same on its way
    result = evaluate(model, corpus, TOKENIZER, **SETTINGS)
    np.testing.assert_allclose(result["specialization"]["load"], load_LDE, rtol=1e-6)
    shares = load_LDE.sum(1) / load_LDE.sum((1, 2))[:, None]
    np.testing.assert_allclose(result["expert_load"], shares, rtol=1e-5)
    sparsity = result["sparsity"]
    if router == "soft":  # every token has a share of every expert
        assert sparsity["layers"] == sparsity["token"] == sparsity["reuse"] == []
    else:
        assert sparsity["layers"] == [1] and sparsity["chunk_length"] == 8
        assert sparsity["token"][0] == pytest.approx(1 - load_LDE.sum() / (E * tokens.sum()), abs=1e-5)
        assert 0 <= sparsity["chunk"][0] < sparsity["token"][0] and 0 < sparsity["reuse"][0] < 1
    mean = sum(result["loss_by_domain"][d] * n for d, n in corpus.targets_per_domain().items()) / result["tokens"]
    assert mean == pytest.approx(result["loss"]) and len(set(result["loss_by_domain"].values())) == 3


def test_every_batch_has_draws_of_its_own_and_every_evaluation_the_same(corpus):
    """THOR with one expert per document: over all batches a row meets several, and twice the same ones."""
    model = tiny_model(vocab_size=TOKENIZER.vocab_size, layers="1*moe", router={"name": "thor"}, losses={})
    batches = [{name: value[:1] for name, value in b.items()} for b in eval_batches(corpus, TOKENIZER, **SETTINGS)]
    whole = [b | {"segment_ids": np.ones_like(b["segment_ids"])} for b in batches]
    first, second = (np.stack(specialization(model, whole, corpus.domains).load) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert len(whole) > 4 and (first.sum((0, 1)) > 0).sum() > 1
