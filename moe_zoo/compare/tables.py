"""Runs of the store in the order of the page: groups of equal cost, and in each a row per entry and settings."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_zoo.compare.claims import STATISTICS, Claim, Reference
from moe_zoo.compare.entries import REFERENCE, Entry
from moe_zoo.compare.statistics import Interval, Run, Verdict, interval, judge, paired

#: the loss that everything is shown by
LOSS = "test_bits_per_byte"


@dataclasses.dataclass(frozen=True)
class Row:
    """The runs of one entry with the same settings, by seed; `to_reference`: their loss minus the reference's."""

    label: str
    entry: str
    claim: Claim | Reference
    runs: tuple[Run, ...]
    verdict: Verdict
    to_reference: Interval | None

    @property
    def causal(self) -> bool:
        """Whether its loss may be compared."""
        return all(run["causal"] for run in self.runs)

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that did not fail."""
        return tuple(run for run in self.runs if not run["failure"])

    def mean(self, statistic: str) -> float | None:
        """Over seeds, of one of `STATISTICS`."""
        found = self.interval(statistic)
        return None if found is None else found.mean

    def interval(self, statistic: str) -> Interval | None:
        """Over seeds; None if no run has it."""
        values = [run["results"].get(statistic) for run in self.finished]
        return interval([v for v in values if v is not None]) if any(v is not None for v in values) else None


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that cost the same: the same data, schedule and decoder, matched in the same way."""

    match: str
    fingerprint: str
    cost_hash: str
    rows: tuple[Row, ...]

    @property
    def runs(self) -> list[Run]:
        """All of them."""
        return [run for row in self.rows for run in row.runs]

    def row(self, label: str) -> Row | None:
        """The row of this label."""
        return next((row for row in self.rows if row.label == label), None)

    @property
    def reference(self) -> Row | None:
        """What differences of the loss are to."""
        return self.row(REFERENCE)


def groups(
    runs: Sequence[Run], entries: Mapping[str, Entry], match: str, reference: str = REFERENCE, loss: str = LOSS
) -> list[Group]:
    """Every run in at least one group. First the largest one of this way of matching (of equal ones, that which was
    last written to), then the other groups that have something to add. `loss`: the statistic that rows are sorted by,
    lowest first, and that is compared with the entry `reference`.
    """
    places: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        for how in run["fits"]:
            places.setdefault((how, run["data"]["fingerprint"], run["cost_hash"]), []).append(run)
    newest = {id(run): number for number, run in enumerate(runs)}
    last = lambda place: max(newest[id(run)] for run in places[place])
    ordered = sorted(places, key=lambda place: (place[0] != match, -len(places[place]), -last(place)))
    shown: set[int] = set()
    found = []
    for place in ordered:
        if not {id(run) for run in places[place]} <= shown:
            shown |= {id(run) for run in places[place]}
            found.append(Group(*place, tuple(_rows(places[place], entries, reference, loss))))
    return found


def _rows(runs: Sequence[Run], entries: Mapping[str, Entry], reference: str, loss: str) -> list[Row]:
    by_settings: dict[tuple[str, str], list[Run]] = {}
    current: dict[str, str] = {}
    for run in runs:
        by_settings.setdefault((run["entry"], run["config_hash"]), []).append(run)
        current[run["entry"]] = run["config_hash"]  # the last one written
    now = lambda name: by_settings[name, current[name]] if name in current else []
    rows = []
    for (name, settings), mine in by_settings.items():
        claim = entries[name].claim if name in entries else Reference("no longer an entry")
        baseline = now(claim.baseline) if isinstance(claim, Claim) else []
        differences = paired(mine, now(reference), loss) if name != reference else {}
        rows.append(
            Row(
                label=name if settings == current[name] else f"{name} (settings {settings[:6]})",
                entry=name,
                claim=claim,
                runs=tuple(sorted(mine, key=lambda run: run["seed"])),
                verdict=judge(claim, mine, baseline),
                to_reference=interval(list(differences.values())) if differences else None,
            )
        )
    worst = float("inf")
    by_loss = lambda row: worst if (value := row.mean(loss)) is None else value
    return sorted(rows, key=lambda row: (not row.causal, by_loss(row), row.label))


#: titles of the columns of `cells`, and whether they are numbers
COLUMNS = (
    ("entry", False), ("test bits per byte", True), ("claim", False), ("difference", True), ("verdict", False),
    ("MFLOP / token", True), ("M params", True), ("active", True), ("minutes", True), ("load violation", True),
    ("worst layer", True), ("experts / token", True), ("dropped", True),
    ("token sparsity", True), ("chunk sparsity", True), ("reuse", True), ("seeds", True),
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """One row of the table, as text."""
    verdict, claim = row.verdict, row.claim
    form = STATISTICS[claim.statistic].form if isinstance(claim, Claim) else ".4f"
    parameters = row.runs[0]["parameters"]
    return [
        row.label + ("" if row.causal else " (sees the future)"),
        plus_minus(row.interval(LOSS), ".4f"),
        claim.short() if isinstance(claim, Claim) else "–",
        plus_minus(verdict.difference, f"+{form}"),
        says(verdict),
        _number(row.mean("train_flops_per_token"), ".2f", 1e-6),
        _number(parameters["total"], ".2f", 1e-6),
        _number(parameters["active"], ".2f", 1e-6),
        _number(minutes(row), ".1f"),
        _number(row.mean("load_violation"), ".2f"),
        _number(row.mean("max_load_violation"), ".2f"),
        _number(row.mean("experts_per_token"), ".2f"),
        _number(row.mean("dropped_fraction"), ".1%"),
        *(_number(row.mean(name), ".1%") for name in ("token_sparsity", "chunk_sparsity", "reuse")),
        str(len(row.runs)) + (f", {failed} failed" if (failed := len(row.runs) - len(row.finished)) else ""),
    ]


def says(verdict: Verdict) -> str:
    """The answer and why, in a few words."""
    if verdict.answer and verdict.reason:
        return f"{verdict.answer}: {verdict.reason}"
    return verdict.answer or verdict.reason


def minutes(row: Row) -> float | None:
    """Of training, the mean over seeds, without compiling and scoring."""
    spent = [run["curves"]["train"]["seconds"][-1] for run in row.finished]
    return float(np.mean(spent)) / 60 if spent else None


def plus_minus(found: Interval | None, form: str) -> str:
    """ "2.1234 ± 0.0100"; of a single seed only the mean."""
    if found is None:
        return "–"
    mean = format(found.mean, form)
    return mean if found.n < 2 else f"{mean} ± {format(found.half, form.lstrip('+'))}"


def _number(value: Any, form: str, scale: float = 1.0) -> str:
    return "–" if value is None else format(value * scale, form)
