"""Verdicts: intervals as scipy has them, pairs by seed, and the answer that an interval gives."""

import math

import numpy as np
import pytest
from scipy import stats

from moe_zoo.compare.claims import Claim, Reference
from moe_zoo.compare.statistics import NO, OPEN, YES, interval, judge, paired

LOWER = Claim("test_bits_per_byte", "lower", baseline="top_k", says="better", source="a paper")
HIGHER = Claim("specialization", "higher", baseline="top_k", says="more", source="a paper")


def runs(values, statistic="test_bits_per_byte", causal=True, failed=()):
    return [
        {"seed": seed, "causal": causal, "failure": "diverged" if seed in failed else None,
         "results": {statistic: None if seed in failed else value}}
        for seed, value in enumerate(values)
    ]  # fmt: skip


def test_interval_is_students():
    found = interval([1.0, 2.0, 4.0])
    # by hand: sd = sqrt(7/3), t(0.975, 2) = 4.302653
    half = 4.302653 * math.sqrt(7 / 3) / math.sqrt(3)
    assert (found.mean, found.n) == (pytest.approx(7 / 3), 3)
    assert found.half == pytest.approx(half, rel=1e-6) and found.low == pytest.approx(7 / 3 - half, rel=1e-6)


def test_interval_of_pairs_is_that_of_scipys_paired_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(2.0, 0.1, 5), rng.normal(2.1, 0.1, 5)
    found = interval(list(paired(runs(a), runs(b), "test_bits_per_byte").values()))
    theirs = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))


def test_one_seed_has_no_interval():
    found = interval([0.5])
    assert found.mean == 0.5 and found.n == 1 and math.isnan(found.low) and math.isnan(found.high)


def test_pairs_are_of_equal_seeds_that_both_have():
    mine, theirs = runs([1.0, 2.0, 3.0], failed=[1]), runs([0.5, 0.5, 0.5, 0.5])
    assert paired(mine, theirs, "test_bits_per_byte") == {0: 0.5, 2: 2.5}


@pytest.mark.parametrize("mine, answer", [([1.90, 1.91, 1.89], YES), ([2.10, 2.11, 2.09], NO), ([1.9, 2.0, 2.1], OPEN)])
def test_answers_for_lower(mine, answer):
    verdict = judge(LOWER, runs(mine), runs([2.0, 2.0, 2.0]))
    assert verdict.answer == answer and verdict.decided
    assert verdict.difference.mean == pytest.approx(np.mean(mine) - 2.0)


@pytest.mark.parametrize("mine, answer", [([0.5, 0.51, 0.52], YES), ([0.1, 0.11, 0.12], NO), ([0.1, 0.3, 0.5], OPEN)])
def test_answers_for_higher(mine, answer):
    assert judge(HIGHER, runs(mine, "specialization"), runs([0.3] * 3, "specialization")).answer == answer


def test_pairing_sees_what_the_spread_over_seeds_would_hide():
    theirs = np.array([1.8, 2.0, 2.2])
    assert judge(LOWER, runs(theirs - [0.010, 0.011, 0.009]), runs(theirs)).answer == YES


@pytest.mark.parametrize(
    "claim, mine, theirs, reason",
    [
        (Reference("baseline"), runs([1.0]), [], "reference"),
        (LOWER, [], runs([1.0]), "no run yet"),
        (LOWER, runs([1.0]), [], "no run of top_k"),
        (LOWER, runs([1.0]), runs([1.1]), "one seed"),
        (LOWER, runs([1.0, 1.0], causal=False), runs([1.1, 1.1]), "sees the future"),
        (LOWER, runs([1.0, 1.0], causal=True), runs([1.1, 1.1], causal=False), "sees the future"),
        (LOWER, runs([1.0]), [{**runs([1.1])[0], "seed": 7}], "no seed in common"),
    ],
)
def test_no_answer_where_there_can_be_none(claim, mine, theirs, reason):
    verdict = judge(claim, mine, theirs)
    assert not verdict.decided and reason in verdict.reason


def test_a_failed_run_answers_no_and_is_named():
    verdict = judge(LOWER, runs([1.0, 1.0, 1.0], failed=[2]), runs([2.0, 2.0, 2.0]))
    assert verdict.answer == NO and "seed 2" in verdict.reason and verdict.difference.n == 2
    assert judge(LOWER, runs([1.0, 1.1, 1.0]), runs([2.0, 2.0, 2.0], failed=[0])).answer == YES
