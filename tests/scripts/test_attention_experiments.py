"""Experiments of attention and early exits: settings that models take, data that says what it should, rules."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import attention_experiments as attention  # noqa: E402
import ponder_experiments as ponder  # noqa: E402


def test_every_kind_of_attention_is_a_model_and_only_full_attention_sees_far_at_full_price():
    flops = {name: attention.attention_flops(name) for name in attention.ARMS}
    assert flops["full"] == 2 * 4 * 64 * (attention.S + 1) / 2 > 3.5 * max(v for n, v in flops.items() if n != "full")
    assert flops["local"] == 2 * 4 * 64 * attention.WINDOW


def test_answers_of_recall_are_the_values_that_were_stated():
    batch = attention.recall(np.random.default_rng(0), 3)
    for tokens, targets, mask in zip(batch["tokens"], batch["targets"], batch["loss_mask"], strict=True):
        K, V = attention.KEYS, attention.VALUES
        stated = dict(np.divmod(token - V - K, V) for token in tokens[:K])
        assert sorted(stated) == list(range(K)) and tokens[K:-K].min() >= V + K + K * V and mask.sum() == K
        assert [stated[token - V] for token in tokens[-K:]] == targets[mask].tolist()


def test_a_table_is_of_all_seeds():
    runs = {"full": {str(seed): dict.fromkeys(attention.COLUMNS, float(seed)) for seed in range(2)}}
    assert "| full | 0.500 +- 0.707 |" in "\n".join(attention.table(runs))


def test_rules_of_leaving():
    halt = np.array([[0.1, 0.6, 0.3], [0.5, 0.9, 0.4], [0.5, 0.5, 0.5]])
    guess = np.array([[0, 1, 2], [0, 1, 1], [1, 1, 1]])
    probs = np.eye(3)[guess]
    seen = ponder.Seen(halt, guess, probs, labels=np.array([1, 1, 0]), steps=np.array([3, 1, 2]))
    left = seen.quantile(0.5)
    assert left["layers"] == pytest.approx((2 + 1 + 2) / 3) and left["accuracy"] == pytest.approx(1 / 3)
    assert left["correlation"] == pytest.approx(np.corrcoef([2, 1, 2], [3, 1, 2])[0, 1])
    assert seen.fixed(1)["accuracy"] == pytest.approx(1 / 3) and seen.fixed(3)["accuracy"] == pytest.approx(2 / 3)
    assert seen.patience(1)["layers"] == pytest.approx((2 + 2 + 3) / 3)
    # of the first: 0.1 + 0.45 for 0, the rest, 0.45, for 1
    assert seen.mixed()["accuracy"] == pytest.approx(1 / 3)
    rules = {"quantile": [left] * 11, "sample": [seen.drawn(i) for i in range(5)], "expectation": [seen.mixed()]}
    rules |= {"its own layers": [seen.fixed(1)], "patience": [seen.patience(1)], "fixed": [seen.fixed(1)]}
    assert "| q = 0.5 | 1.667 +- 0.000 | 0.333 +- 0.000 |" in ponder.table({"0": rules, "1": rules})
