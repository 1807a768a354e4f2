"""Fills rows of an output with zeros from inside a TPU kernel, by copies spread over the kernel's steps.

The rows before the first group at hand and after the last belong to no tile. In an expert-parallel layer they can be
most of the output: written at the end they would keep the matrix units waiting, written at the start the operands.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _tpu_schedule as schedule

Scalar = schedule.Scalar


class Progress(NamedTuple):
    """Rows [0, head_end) and [tail_first, num_rows) of every column tile become zero; next: from `row` of tile `n`.

    debt: copies that earlier steps were too short of to start, times the number of steps.
    """

    head_end: Scalar
    tail_first: Scalar
    n: Scalar
    row: Scalar
    debt: Scalar


@dataclasses.dataclass(frozen=True)
class Fill:
    """How to fill an output of num_rows rows (a multiple of 8) in num_tiles column tiles.

    copy(n, row, rows) makes the copy of `rows` (at most most_rows) zero rows to the rows from `row` of column tile n.
    All copies must share one semaphore.
    """

    num_rows: int
    num_tiles: int
    most_rows: int
    copy: Callable[[Scalar, Scalar, Scalar], Any]

    def outside(
        self, live_first: Scalar, live_end: Scalar, fragment: int, core: Scalar | int = 0, num_cores: int = 1
    ) -> Progress:
        """All fragments without a row of [live_first, live_end). The first core fills the head, the last the tail."""
        head_end = schedule.round_down(live_first, fragment)
        tail_first = jnp.where(live_end <= live_first, head_end, schedule.round_up(live_end, fragment))
        head_end = jnp.where(core == 0, head_end, 0)
        tail_first = jnp.where(core == num_cores - 1, jnp.minimum(tail_first, self.num_rows), self.num_rows)
        some = (head_end > 0) | (tail_first < self.num_rows)
        n, row = jnp.where(some, 0, self.num_tiles), jnp.where(head_end > 0, 0, tail_first)
        return Progress(head_end, tail_first, n, row, debt=jnp.int32(0))

    def copies(self, zeros: Progress) -> Scalar:
        """How many copies fill everything. The head and the tail may end with a short one."""
        number = lambda rows: jax.lax.div(rows + (self.most_rows - 1), jnp.int32(self.most_rows))
        return (number(zeros.head_end) + number(self.num_rows - zeros.tail_first)) * self.num_tiles

    def start(self, zeros: Progress, copies: Scalar) -> Progress:
        """Starts the next `copies` copies, or as many as are left."""
        return self._walk(zeros, copies, lambda copy: copy.start())

    def start_share(self, zeros: Progress, copies: Scalar, steps: Scalar) -> Progress:
        """Starts the share of one of `steps` steps: copies / steps on average, by counting rather than by division."""
        due, debt = jax.lax.while_loop(
            lambda state: state[1] >= steps,
            lambda state: (state[0] + 1, state[1] - steps),
            (jnp.int32(0), zeros.debt + copies),
        )
        return self.start(zeros._replace(debt=debt), due)

    def wait(self, zeros: Progress) -> None:
        """Waits for all copies; `zeros` as `outside` gave it."""
        self._walk(zeros, self.copies(zeros), lambda copy: copy.wait())

    def _walk(self, zeros: Progress, copies: Scalar, visit: Callable[[Any], None]) -> Progress:
        def body(_: Scalar, z: Progress) -> Progress:
            live = z.n < self.num_tiles
            end = jnp.where(z.row < z.head_end, z.head_end, self.num_rows)
            row = pl.multiple_of(z.row, 8)
            rows = pl.multiple_of(jnp.minimum(end - row, self.most_rows), 8)

            @pl.when(live)
            def _():
                visit(self.copy(z.n, row, rows))

            below = row + rows
            below = jnp.where(below == z.head_end, z.tail_first, below)
            wraps = live & (below >= self.num_rows)
            top = jnp.where(z.head_end > 0, 0, z.tail_first)
            row = jnp.where(wraps, top, jnp.where(live, below, z.row))
            return z._replace(n=z.n + wraps.astype(jnp.int32), row=row)

        return jax.lax.fori_loop(jnp.int32(0), copies, body, zeros)
