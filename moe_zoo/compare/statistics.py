"""From runs to verdicts: differences to the baseline seed by seed, their interval, and what that says of the claim.

A seed is the same initial weights, data, order and split for every entry, so runs are compared in pairs of equal seeds:
d_s = entry_s - baseline_s. The interval is Student's, mean +- t(0.975, n - 1) sd / sqrt(n).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_zoo.compare.claims import ALL_STATISTICS, Claim, Reference

#: the answers, and what is said where there can be none
YES, NO, OPEN = "yes", "no", "not distinguishable"

Run = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Interval:
    """Mean over `n` seeds, with its 95% interval; without one (NaN) for a single seed."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's interval of the mean of independent values."""
    values = np.asarray(values, float)
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    from scipy import stats  # imported here: it takes a second that listing should not pay

    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired(entry: Sequence[Run], baseline: Sequence[Run], statistic: str) -> dict[int, float]:
    """{seed: entry - baseline} over the seeds that both have a value for."""
    value = lambda run: run["results"].get(statistic)
    theirs = {run["seed"]: value(run) for run in baseline if value(run) is not None}
    mine = {run["seed"]: value(run) for run in entry if value(run) is not None}
    return {seed: mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of a claim. `answer`: `YES`, `NO`, `OPEN`, or why there is none; `difference` to the baseline, in the
    units of the statistic, if there is a pair.
    """

    answer: str
    difference: Interval | None
    reason: str = ""

    @property
    def decided(self) -> bool:
        """Whether the claim was answered, be it that nothing can be told apart."""
        return self.answer in (YES, NO, OPEN)


def judge(claim: Claim | Reference, entry: Sequence[Run], baseline: Sequence[Run]) -> Verdict:
    """The verdict on a claim, from the runs of the entry and of its baseline at equal cost.

    Yes: the whole interval is on the claimed side of zero. No: the whole interval is on the other side. A run that
    failed answers no: a model that cannot be trained is not better.
    """
    if isinstance(claim, Reference):
        return Verdict("", None, "reference")
    if not entry:
        return Verdict("", None, "no run yet")
    if not baseline:
        return Verdict("", None, f"no run of {claim.baseline} yet")
    statistic = ALL_STATISTICS[claim.statistic]
    if statistic.needs_causal and not all(run["causal"] for run in (*entry, *baseline)):
        return Verdict("", None, "not causal: its loss sees the future")
    shared = {run["seed"] for run in entry} & {run["seed"] for run in baseline}
    failed = sorted(run["seed"] for run in entry if run["failure"] and run["seed"] in shared)
    differences = paired(entry, baseline, claim.statistic)
    found = interval(list(differences.values())) if differences else None
    if failed:
        return Verdict(NO, found, f"training failed with seed {', '.join(map(str, failed))}")
    if found is None:
        return Verdict("", None, f"no seed in common with {claim.baseline}")
    if found.n < 2:
        return Verdict("", found, "one seed: no interval")
    low, high = sorted((claim.sign * found.low, claim.sign * found.high))
    return Verdict(YES if high < 0 else NO if low > 0 else OPEN, found)
