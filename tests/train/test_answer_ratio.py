"""The ratio of two answers' losses: by hand, pair by pair, and however the step is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_zoo.core.aux import Aux
from moe_zoo.core.registry import ConfigError
from moe_zoo.data import ByteTokenizer, PackedSource, build_corpus
from moe_zoo.data.formats.records import to_document
from moe_zoo.train.objective import OBJECTIVES

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def batch():
    """Four rows of pairs of two domains; some are cut by a row's end."""
    records = [
        {"prompt": "q" * (i % 3 + 1), "answer": "y" * (i % 4 + 1), "rejected": "n" * (i % 5 + 1), "domain": "ab"[i % 2]}
        for i in range(24)
    ]
    source = PackedSource(build_corpus([to_document(r, "") for r in records], TOKENIZER), TOKENIZER, 48, seed=0)
    return source.rows(np.arange(4))


@pytest.fixture(scope="module")
def logits():
    return jnp.asarray(np.random.default_rng(0).standard_normal((4, 48, TOKENIZER.vocab_size)), jnp.float32)


def make(**settings):
    cls = OBJECTIVES.get("answer_ratio", "train.objective.name")
    return cls(cls.Config(**settings))


def saying(logits):
    """A model that says this."""
    return lambda tokens, **_: (logits, Aux(), None)


def loss_of(settings, batch, logits, parts=1):
    """The sums over `parts` micro-batches of a step whose model says `logits`."""
    objective = make(**settings)
    whole = objective.weighted(batch)
    total, scalars = 0.0, {}
    for rows in np.split(np.arange(4), parts):
        micro = {name: value[rows] for name, value in whole.items()}
        loss, stats = objective.loss(saying(logits[rows]), micro, {}, step=0, key=None, fraction=1 / parts)
        total += float(loss)
        for name, stat in stats["scalars"].items():
            scalars[name] = scalars.get(name, 0.0) + float(stat.value())
    return total, scalars


def ratios(batch, logits, prefer="answer", domains=()):
    """One pair after the other."""
    nll = -np.asarray(jax.nn.log_softmax(logits))
    wanted, other = batch["loss_mask"], batch["rejected_mask"]
    if prefer == "rejected":
        wanted, other = other, wanted
    found = []
    for row in range(4):
        for pair in np.unique(batch["segment_ids"][row] // 2):
            inside = batch["segment_ids"][row] // 2 == pair
            places = [np.flatnonzero(inside & mask[row]) for mask in (wanted, other)]
            one, two = (nll[row, t, batch["targets"][row, t]] for t in places)
            if pair and len(one) and len(two) and (not domains or batch["domain"][row][inside][0] in domains):
                found.append(one.mean() / two.mean())
    return found


@pytest.mark.parametrize("settings", [{}, {"prefer": "rejected"}, {"prefer": "rejected", "domains": (1,)}])
def test_the_mean_over_pairs_of_the_ratio_of_means(batch, logits, settings):
    expected = ratios(batch, logits, **settings)
    assert 4 < len(expected) < 24
    for parts in (1, 2):
        loss, scalars = loss_of(settings, batch, logits, parts)
        np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)
        np.testing.assert_allclose(scalars["answer_ratio"], loss, rtol=1e-6)
        assert scalars["loss"] > 0 and scalars["other_loss"] > 0


def test_both_answers_get_gradient_and_nothing_else(batch, logits):
    whole = make().weighted(batch)
    loss = lambda z: make().loss(saying(z), whole, {}, step=0, key=None, fraction=1.0)[0]
    slope = np.abs(np.asarray(jax.grad(loss)(logits))).max(-1)
    assert not (slope[~(batch["loss_mask"] | batch["rejected_mask"])]).any()
    assert (slope[batch["rejected_mask"]] > 0).all()


def test_data_with_one_answer_is_refused(batch, logits):
    alone = {name: value for name, value in batch.items() if name != "rejected_mask"}
    with pytest.raises(ConfigError, match="'answer_ratio' compares two answers to a prompt, and the data has one"):
        loss_of({}, alone, logits)
