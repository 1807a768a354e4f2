"""The state of one core and the loop that runs a program on it."""

import bisect
import time
from collections import Counter, defaultdict, deque
from typing import Any

import numpy as np

from tpu_sim.generations import DMA_LATENCY_S, Generation
from tpu_sim.program import Program
from tpu_sim.scalar import ADDRESS, OPERAND_BASE, OPERAND_BITS

#: operands beyond this many elements are never tables
LARGEST_TABLE = 1 << 20


class Machine:
    """Registers, SMEM, the clock (in cycles), DMA queues and what has been counted so far."""

    def __init__(self, generation: Generation, operands: list[np.ndarray | None]):
        self.operands = operands
        self.registers: dict[str, Any] = {}
        self.smem: dict[int, Any] = {}
        self._written: dict[str, int] = {}
        self._writes = 0
        self.bytes_per_cycle = generation.hbm_bytes_per_s / generation.clock_hz
        self._granule_bytes = generation.dma_granule_bytes
        self.dma_latency = DMA_LATENCY_S * generation.clock_hz
        self.cycles = 0.0
        self.hbm_free, self.last_write = 0.0, 0.0
        self.mxu_free: defaultdict[int, float] = defaultdict(float)
        self._in_flight: defaultdict[Any, deque[list]] = defaultdict(deque)
        self.bundles = self.matmuls = self.unknown_decisions = self.unmatched_waits = 0
        self.dma_stall = self.mxu_stall = 0.0
        self.bytes: Counter[str] = Counter()
        self.dmas: Counter[str] = Counter()

    def set(self, register: str, value: Any) -> None:
        self._writes += 1
        self.registers[register] = value
        self._written[register] = self._writes

    def set_together(self, values: list[tuple[str, Any]]) -> None:
        """Writes that count as simultaneous."""
        self._writes += 1
        for register, value in values:
            self.registers[register] = value
            self._written[register] = self._writes

    def written_at(self, register: str) -> int:
        return self._written.get(register, -1)

    def scalar_operand(self, index: int) -> int | None:
        operand = self.operands[index] if index < len(self.operands) else None
        return None if operand is None else int(operand.reshape(-1)[0])

    def start_dma(self, kind: str, source: Any, granules: Any, target: Any, flag: Any) -> None:
        """Queues a copy. Tables that are copied to SMEM arrive there at once: nothing reads them before its wait."""
        if granules is None:
            self.unknown_decisions += 1
            return
        size = granules * self._granule_bytes
        if kind.endswith("to_smem"):
            self._load_table(source, target)
            landed = self.cycles + self.dma_latency
        elif "hbm" in kind:
            self.hbm_free = max(self.cycles, self.hbm_free) + size / self.bytes_per_cycle
            landed = self.hbm_free + self.dma_latency
            self.bytes["read" if kind.startswith("hbm") else "write"] += size
            self.dmas[kind] += 1
        else:
            landed = self.cycles + 64 + size / (4 * self.bytes_per_cycle)
            self.dmas[kind] += 1
            self.bytes["on_chip"] += size
        self._in_flight[flag].append([landed, granules])
        self.last_write = max(self.last_write, landed)

    def _load_table(self, source: Any, target: Any) -> None:
        if source is None or source < ADDRESS or target is None:
            return
        while source.bit_length() > OPERAND_BASE.bit_length():  # the address has been scaled
            source >>= 4
        index = (source - OPERAND_BASE) >> OPERAND_BITS
        table = self.operands[index] if 0 <= index < len(self.operands) else None
        if table is None or table.size > LARGEST_TABLE:
            return
        # rows of a matrix are padded to whole lanes
        rows = table.reshape(-1, table.shape[-1]) if table.ndim >= 2 else table.reshape(1, -1)
        pitch = -(-rows.shape[-1] // 128) * 128
        for r, row in enumerate(rows):
            for j, value in enumerate(row.tolist()):
                self.smem[target + r * pitch + j] = int(value)

    def wait(self, flag: Any, granules: Any) -> None:
        """Blocks until `granules` of the copies on `flag` have landed."""
        if granules is None or flag is None:
            self.unknown_decisions += 1
            return
        queue, landed = self._in_flight[flag], 0
        while granules > 0 and queue:
            copy = queue[0]
            landed = max(landed, copy[0])
            taken = min(granules, copy[1])
            copy[1] -= taken
            granules -= taken
            if copy[1] == 0:
                queue.popleft()
        if granules > 0:
            self.unmatched_waits += 1
        if landed > self.cycles:
            self.dma_stall += landed - self.cycles
            self.cycles = landed

    def pass_bundles(self, program: Program, begin: int, end: int, mxu_cycles: int) -> int:
        """Lets the bundles' time pass; an MXU that falls behind by more than its queue holds the core up."""
        before, queue = self.cycles, 8 * mxu_cycles
        self.bundles += end - begin
        self.cycles += end - begin
        matmuls = 0
        for unit in program.units:
            issued = program.issues[unit][end] - program.issues[unit][begin]
            if not issued:
                continue
            matmuls += issued
            self.mxu_free[unit] = max(self.mxu_free[unit], before) + issued * mxu_cycles
            late = self.mxu_free[unit] - queue - self.cycles
            if late > 0:
                self.mxu_stall += late
                self.cycles = self.mxu_free[unit] - queue
        self.matmuls += matmuls
        return matmuls


def simulate(
    program: Program, generation: Generation, operands: list[np.ndarray | None], limit_s: float, core: int = 0
) -> tuple[Machine, str | None, list[dict]]:
    """Runs the program on one core. Returns (machine, error or None, the four blocks that took most cycles)."""
    m = Machine(generation, operands)
    if program.core_id_address is not None:
        m.smem[program.core_id_address] = core
    starts = program.block_starts(generation.delay_slots)
    blocks: defaultdict[int, list] = defaultdict(lambda: [0, 0.0, 0])
    begun, turns, i, jump = time.monotonic(), 0, 0, None
    while i < program.size:
        turns += 1
        if turns % 20000 == 0 and time.monotonic() - begun > limit_s:
            return m, "time limit: simulation incomplete", []
        for step in program.steps[i] or ():
            step(m)
        if program.branches[i]:
            jump = _branch(m, program.branches[i], program.after_slots(i, generation.delay_slots)) or jump
        following = program.follows[i] if jump is None else min(program.follows[i], jump[0])
        before = m.cycles
        matmuls = m.pass_bundles(program, i, following, generation.mxu_cycles)
        block = blocks[bisect.bisect_right(starts, i) - 1]
        block[0] += following - i
        block[1] += m.cycles - before
        block[2] += matmuls
        i = following
        if jump and i >= jump[0]:
            i, jump = jump[1], None
    m.cycles = max([m.cycles, m.last_write, *m.mxu_free.values()])
    return m, None, _hot_blocks(program, starts, blocks)


def _branch(m: Machine, branch: tuple, after_slots: int) -> tuple[int, int] | None:
    """(bundle where the jump happens, target) if the branch is taken. An unknown branch is not."""
    predicate, target = branch
    taken = True if predicate is None else predicate(m)
    if taken is None:
        m.unknown_decisions += 1
    return (after_slots, target) if taken and target is not None else None


def _hot_blocks(program: Program, starts: list[int], blocks: dict[int, list]) -> list[dict]:
    ends = [*starts[1:], program.size]
    return [
        {
            "first": starts[b],
            "bundles": ends[b] - starts[b],
            "vmatmul": program.matmuls_between(starts[b], ends[b]),
            "run_bundles": bundles,
            "run_cycles": round(cycles),
            "run_vmatmul": matmuls,
        }
        for b, (bundles, cycles, matmuls) in sorted(blocks.items(), key=lambda item: -item[1][1])[:4]
    ]
