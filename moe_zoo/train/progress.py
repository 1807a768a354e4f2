"""What a person sees while a model trains: a bar on a terminal, one plain line per interval everywhere else."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import rich.console
import rich.progress

PLAIN_WIDTH = 100  # columns, where there is no terminal to ask
_REDRAW_SECONDS = 0.25


def make_console(file: TextIO | None = None) -> rich.console.Console:
    """A console with colours exactly when the file (standard output by default) is a terminal.

    Rich by itself also colours a pipe if `FORCE_COLOR` is set, as many CI services do; a log should stay plain.
    """
    file = sys.stdout if file is None else file
    terminal = file.isatty() and os.environ.get("TERM") != "dumb"
    width = None if terminal else PLAIN_WIDTH
    return rich.console.Console(file=file, force_terminal=terminal, width=width, highlight=False, soft_wrap=False)


class Progress:
    """Shows step, share done, loss, bits per byte, tokens/s and time left.

            with Progress(total_steps=1000) as progress:
                for step in range(1, 1001):
                    ...
                    progress.update(step, step / 1000, {"loss": 1.9, "bits_per_byte": 2.7}, tokens_per_second=18e3)

    `update` costs a microsecond or so except when it draws, so the loop may call it every step. It never waits for a
    device: pass metrics only when they are on the host already (numbers, not pending arrays), and leave them out
    otherwise; the last known ones stay on display. No thread is used, since a CPU run needs its cores for training.

    Args:
        total_steps: steps to train, if it is known.
        minutes: time to train, if that is what ends the run; used until there is a speed to reckon time left from.
        every: seconds between lines when the output is not a terminal.
        console: where to show it; standard output by default.
    """

    def __init__(
        self,
        total_steps: int | None = None,
        minutes: float | None = None,
        *,
        every: float = 10.0,
        console: rich.console.Console | None = None,
    ):
        self._total_steps = total_steps
        self._minutes = minutes
        self._console = make_console() if console is None else console
        self._interval = _REDRAW_SECONDS if self._console.is_terminal else every
        self._metrics: dict[str, Any] = {}
        self._tokens_per_second: float | None = None
        self._first: tuple[float, float] | None = (
            None  # time and fraction of the first update: compiling came before it
        )
        self._latest: tuple[int, float] | None = None  # step and fraction
        self._drawn: tuple[int, float] | None = None
        self._next_draw = -math.inf
        self._bar: rich.progress.Progress | None = None

    def update(
        self,
        step: int,
        progress_fraction: float,
        metrics: Mapping[str, Any] | None = None,
        tokens_per_second: float | None = None,
    ) -> None:
        """Takes note of where training is, and draws if it is time to.

        Args:
            step: steps done.
            progress_fraction: share of the run done, 0 to 1 (by steps or by time, as the run is limited).
            metrics: host numbers; "loss" (nats per token or example), "bits_per_byte", "accuracy", and the two of
                validation are shown.
            tokens_per_second: training speed.
        """
        now = time.monotonic()
        if metrics:
            self._metrics.update(metrics)
        if tokens_per_second is not None:
            self._tokens_per_second = tokens_per_second
        if self._first is None:
            self._first = now, progress_fraction
        self._latest = step, progress_fraction
        if now >= self._next_draw:
            self._draw(now)

    def print(self, text: str) -> None:
        """Prints a line of its own: above the bar, or between the plain lines."""
        if self._bar is None:
            print(text, file=self._console.file, flush=True)
        else:
            self._console.print(text, markup=False, highlight=False)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(bar_width=None, complete_style="cyan", finished_style="cyan"),
                rich.progress.TextColumn("{task.fields[numbers]}", markup=False),
                console=self._console,
                auto_refresh=False,
                expand=True,
            )
            self._bar.add_task("compiling", total=1.0, numbers="")
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._latest is not None and self._latest != self._drawn:
            self._draw(time.monotonic())
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, now: float) -> None:
        self._next_draw = now + self._interval
        self._drawn = step, fraction = self._latest
        of_total = f"/{self._total_steps:,}" if self._total_steps else ""
        head = f"step {step:,}{of_total} {fraction:4.0%}"
        numbers = "  ".join(self._numbers(now, fraction))
        if self._bar is None:
            print(f"{head}  {numbers}".rstrip(), file=self._console.file, flush=True)
        else:
            self._bar.update(0, completed=fraction, description=head, numbers=numbers)
            self._bar.refresh()

    def _numbers(self, now: float, fraction: float) -> list[str]:
        shown = []
        labels = {
            "loss": "loss", "bits_per_byte": "bits/byte", "validation_bits_per_byte": "validation",
            "accuracy": "accuracy", "validation_accuracy": "validation",
        }  # fmt: skip
        for name, label in labels.items():
            if (value := self._metrics.get(name)) is not None:
                shown.append(f"{label} {float(value):.3f}")
        if self._tokens_per_second is not None:
            shown.append(f"{short_number(self._tokens_per_second)} tokens/s")
        if (left := self._seconds_left(now, fraction)) is not None:
            shown.append(f"{duration(left)} left")
        return shown

    def _seconds_left(self, now: float, fraction: float) -> float | None:
        """From the speed since the first update: a resumed run starts part of the way, and compiling came before it."""
        first_time, first_fraction = self._first
        if fraction > first_fraction and now > first_time:
            return max(0.0, 1.0 - fraction) * (now - first_time) / (fraction - first_fraction)
        return None if self._minutes is None else max(0.0, 1.0 - fraction) * self._minutes * 60


def short_number(value: float) -> str:
    """Three significant digits and a letter: 18234 is "18.2k"."""
    if not math.isfinite(value):
        return str(value)
    suffixes = ["", "k", "M", "G", "T", "P", "E"]
    while abs(value) >= 999.5 and len(suffixes) > 1:
        value /= 1000
        suffixes.pop(0)
    suffix = suffixes[0]
    digits = 0 if abs(value) >= 99.95 or (not suffix and value == int(value)) else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}{suffix}"


def duration(seconds: float) -> str:
    """Two units at most: "48s", "3m 12s", "2h 05m"."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
