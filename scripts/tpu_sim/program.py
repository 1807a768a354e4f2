"""A kernel's bundles, made ready to be run: closures for scalar work, running counts of MXU issues."""

import itertools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from tpu_sim import llo
from tpu_sim.scalar import Read, ScalarCompiler, Step


class Program:
    """Bundles 0 .. size.

    `steps[i]` are the scalar closures of bundle i, `branches[i]` its (predicate or None, target bundle), `follows[i]`
    the next bundle that has either: what lies between only takes time. `issues[u][i]` counts MXU u's issues before i.
    """

    def __init__(self, text: str):
        bundles, self._region_start = llo.parse(text)
        self.size = len(bundles)
        self._scalar = ScalarCompiler()
        self.operands, self.unknown_ops = self._scalar.operands, self._scalar.unknown_ops
        core_id = llo.core_id_allocation(text)
        self.core_id_address = None if core_id is None else self._scalar.allocation(core_id)
        self.steps: list[list[Step] | None] = []
        self.branches: list[tuple[Read | None, int | None] | None] = []
        matmuls: list[Counter[int]] = []
        for bundle in bundles:
            steps, branch, count = self._compile(bundle)
            self.steps.append(steps or None)
            self.branches.append(branch)
            matmuls.append(count)
        self.units = sorted(set().union(*matmuls)) or [0]
        self.issues = {
            unit: list(itertools.accumulate((count[unit] for count in matmuls), initial=0)) for unit in self.units
        }
        self.follows = self._follows()
        self._places = [(bundle.label, bundle.depth) for bundle in bundles]

    def after_slots(self, i: int, delay_slots: int) -> int:
        """The bundle from which the branch in bundle i jumps, if it is taken.

        tpu7x has one slot, and closes loops early: what the text still counts to the loop runs in every turn, or the
        loop's variables would not advance.
        """
        after = i + delay_slots + 1
        target = self.branches[i][1]
        if delay_slots > 1 or target is None or target > i:
            return after
        depth, at = self._places[i][1] or 1, after
        while at < self.size and not self._places[at][0] and self.branches[at] is None:
            at += 1
            if self._places[at - 1][1] >= depth:
                after = at
        return after

    def block_starts(self, delay_slots: int) -> list[int]:
        """First bundles of the basic blocks."""
        after_branch = {self.after_slots(i, delay_slots) for i, branch in enumerate(self.branches) if branch}
        return sorted(set(self._region_start.values()) | {0} | after_branch)

    def matmuls_between(self, begin: int, end: int) -> int:
        return sum(counts[end] - counts[begin] for counts in self.issues.values())

    def signature(self) -> list[tuple[str, str]]:
        """(dtype, dims) of the operands, in order."""
        return [(dtype, dims) for _, (_, dtype, dims) in sorted(self.operands.items())]

    def _follows(self) -> list[int]:
        following, result = self.size, [self.size] * (self.size + 1)
        for i in range(self.size - 1, -1, -1):
            result[i] = following
            if self.steps[i] or self.branches[i]:
                following = i
        return result

    def _compile(self, bundle: llo.Bundle) -> tuple[list[Step], tuple[Read | None, int | None] | None, Counter[int]]:
        sizes = iter(bundle.dma_sizes)
        steps, phis, branch, matmuls = [], [], None, Counter()
        for i in bundle.instructions:
            if i.op.startswith("vmatmul"):
                unit = re.search(r"mxu(\d)", f"{i.op} {i.rest}")
                matmuls[int(unit.group(1)) if unit else -1] += 1
            elif i.op[0] == "v" and not i.op.startswith("vsync"):
                continue
            elif i.op == "sphi":
                phis.append((i.dst, [a.strip() for a in i.rest.split(",")]))
            elif i.op in ("sbr.rel", "sbr.abs"):
                branch = self._branch(i.rest)
            elif step := self._scalar.step(i.dst, i.op, i.rest, sizes, bundle.dma_kind):
                steps.append(step)
        return ([_phi(phis)] if phis else []) + steps, branch, matmuls

    def _branch(self, rest: str) -> tuple[Read | None, int | None]:
        predicate, target = re.search(r"\((!?)(%\w+)\)", rest), re.search(r"region(\d+)", rest)
        to = self._region_start.get(int(target.group(1))) if target else None
        return (None if predicate is None else _predicate(predicate.group(2), bool(predicate.group(1)))), to


def _predicate(register: str, negated: bool) -> Callable[[Any], bool | None]:
    def read(m: Any) -> bool | None:
        value = m.registers.get(register)
        return None if value is None else bool(value) != negated

    return read


def _phi(phis: list[tuple[str, list[str]]]) -> Step:
    """Takes of each phi's sources the one written last; all phis of a bundle read before any writes."""

    def step(m: Any) -> None:
        latest = [(dst, m.registers.get(max(sources, key=m.written_at))) for dst, sources in phis]
        m.set_together(latest)

    return step
