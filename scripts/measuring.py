"""Contenders timed in turn, round after round, and compared by lower quartiles: what a shared machine allows."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass
class Timing:
    """Seconds per call."""

    cpu_s: float
    wall_s: float


def _once(call: Callable[[], Any], repeats: int) -> Timing:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return Timing((time.process_time() - cpu) / repeats, (time.perf_counter() - wall) / repeats)


def compare(contenders: dict[str, Callable[[], Any]], rounds: int, repeats: int) -> dict[str, Timing]:
    """Lower quartiles over `rounds` interleaved rounds, each the mean of `repeats` calls. Compiles first."""
    for call in contenders.values():
        jax.block_until_ready(call())
    samples: dict[str, list[Timing]] = {name: [] for name in contenders}
    names = list(contenders)
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            samples[name].append(_once(contenders[name], repeats))
    quartile = lambda values: float(np.quantile(values, 0.25))
    return {n: Timing(quartile([t.cpu_s for t in ts]), quartile([t.wall_s for t in ts])) for n, ts in samples.items()}


def print_table(title: str, timings: dict[str, Timing], baseline: str, gflop: float = 0) -> None:
    """One line per contender; `gflop` is the useful work of one call, if it has any."""
    base = timings[baseline]
    print(f"{title}: lower quartiles, ratios to {baseline!r}")
    width = max(24, *map(len, timings))
    print(f"  {'':{width}}{'CPU ms':>9}{'ratio':>7}{'wall ms':>9}{'ratio':>7}{'GF per CPU s' if gflop else '':>14}")
    for name, t in timings.items():
        print(
            f"  {name:{width}}{t.cpu_s * 1e3:9.1f}{t.cpu_s / base.cpu_s:7.2f}{t.wall_s * 1e3:9.1f}"
            f"{t.wall_s / base.wall_s:7.2f}" + (f"{gflop / t.cpu_s:14.1f}" if gflop else "")
        )
