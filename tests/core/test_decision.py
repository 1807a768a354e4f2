"""Conversions between kinds of decisions."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_zoo.core.decision import Dense, TokenChoice

E = 4
EXPERTS = np.array([[0, 2], [2, E], [E, E], [3, 2]])
GATES = np.array([[0.5, 0.25], [1.0, 7.0], [2.0, 2.0], [-0.5, 0.125]], np.float32)


@pytest.fixture
def choice():
    return TokenChoice(jnp.asarray(EXPERTS), jnp.asarray(GATES), E)


def test_counts_are_per_expert_and_skip_no_expert(choice):
    np.testing.assert_array_equal(choice.counts(), [1, 0, 3, 1])
    np.testing.assert_array_equal(choice.live(), EXPERTS < E)


def test_dense_holds_each_gate_at_its_expert(choice):
    expected = np.zeros((4, E))
    for t in range(4):
        for k in range(2):
            if EXPERTS[t, k] < E:
                expected[t, EXPERTS[t, k]] += GATES[t, k]
    np.testing.assert_array_equal(choice.dense().gates, expected)


def test_masked_sends_invalid_tokens_nowhere_even_when_their_gate_is_nan(choice):
    bad = TokenChoice(choice.experts, choice.gates.at[0].set(jnp.nan), E)
    masked = bad.masked(jnp.array([False, True, True, False]))
    np.testing.assert_array_equal(masked.experts, [[E, E], [2, E], [E, E], [E, E]])
    np.testing.assert_array_equal(masked.gates, [[0, 0], GATES[1], GATES[2], [0, 0]])
    assert choice.masked(None) is choice


def test_top_brings_back_what_dense_spread_out(choice):
    back = choice.dense().top(2)
    np.testing.assert_array_equal(back.dense().gates, choice.dense().gates)
    np.testing.assert_array_equal(back.counts(), choice.counts())
    np.testing.assert_array_equal(back.experts[2], [E, E])


def test_top_keeps_the_largest_in_absolute_value():
    top = Dense(jnp.array([[0.1, -3.0, 0.0, 2.0]])).top(2)
    np.testing.assert_array_equal(top.experts, [[1, 3]])
    np.testing.assert_array_equal(top.gates, [[-3.0, 2.0]])


def test_dense_masked_zeroes_invalid_tokens():
    dense = Dense(jnp.ones((2, 3))).masked(jnp.array([True, False]))
    np.testing.assert_array_equal(dense.gates, [[1, 1, 1], [0, 0, 0]])
