"""Tile sizes of the TPU kernels of the grouped matmul: formulas of the shape and the target, no table.

Dims as in api.py. Times are in cycles of the target's clock.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax.numpy as jnp

from pallas_kernels import _tpu_schedule
from pallas_kernels._tpu_target import Target

LANES = 128
#: Cycles of one straight run of the matrix units. Longer ones hide more of filling and draining, and are more code.
BODY_CYCLES = 4096
#: So few rows of lhs are copied in once, instead of once per group.
MOST_STAYING_ROWS = 256
#: With few rows, matrices are copied all the time: two copies on their way have to cover the latency of the HBM.
LEAST_COPY_BYTES = 2 * 2**20
#: Share of VMEM that buffers may take; the compiler needs some for itself.
VMEM_SHARE = 0.8
VMEM_LIMIT_SHARE = 0.94


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """How the forward kernel cuts its work.

    rows, cols: tile of the output.
    body_rows, body_cols: what one straight run of the matrix units multiplies; long and short runs of rows.
    short_runs: at most so many short runs in a tile; a longer rest is worth a long run.
    weight_buffers, usual_weights, deep_rows: matrix tiles in VMEM; how many are asked for ahead in general (with the
      one in use), and the row of a group from which on all buffers are filled.
    least_rows: so many rows take as long to multiply as a matrix tile to copy.
    lhs_buffers, out_buffers: row tiles in VMEM. lhs_stays: all of lhs does, in one buffer.
    """

    rows: int
    cols: int
    body_rows: tuple[int, int]
    short_runs: int
    body_cols: int
    weight_buffers: int
    usual_weights: int
    deep_rows: int
    least_rows: int
    lhs_buffers: int
    out_buffers: int
    lhs_stays: bool
    zero_rows: int
    vmem_limit_bytes: int

    def num_col_tiles(self, N: int) -> int:
        return -(-N // self.cols)


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to


def _mxu_unit(N: int, target: Target) -> int:
    return target.mxu_size if N % target.mxu_size == 0 else LANES


def _column_tiles(N: int, unit: int) -> list[int]:
    """Widths worth trying: for each number of tiles, the narrowest that covers N; or N, if it is no whole lanes."""
    if N % LANES:
        return [N]
    return sorted({_round_up(-(-N // n), unit) for n in range(1, N // unit + 1)}, reverse=True)


def _runs(M: int, G: int, fragment: int, target: Target) -> list[tuple[int, int, int]]:
    """Candidates for (rows of a long run, of a short one, the most short ones that beat a long one).

    What a group wastes is half a short run. But a run has a fixed cost, see _run_overhead.
    """
    if target.mxu_size == 128:
        runs = [(128, 64, 1)]
    elif target.mxu_accumulates:
        runs = [(256, 64, 2)]
    else:
        runs = [(512, 128, 3), (256, 128, 1)]
    rows = _round_up(M, fragment)
    if M <= fragment * min(M, G):
        # Groups of a few rows, as in decoding: a fragment, or two that share them.
        rows = min(rows, 2 * fragment)
    if rows <= runs[0][1]:
        return [(rows, rows, 0)]
    return [(min(r[0], _round_up(rows, r[1])), r[1], r[2]) for r in runs]


def _body_cols(cols: int, K: int, rows: int, target: Target) -> int:
    """The widest block of columns whose run stays within BODY_CYCLES, or the narrowest."""
    blocks = [c for c in range(LANES, cols + 1, LANES) if cols % c == 0] or [cols]
    blocks = [c for c in blocks if c % target.mxu_size == 0] or blocks
    return max([c for c in blocks if rows * K * c <= BODY_CYCLES * target.macs_per_cycle], default=blocks[0])


def forward_tiles(
    M: int, K: int, N: int, G: int, lhs_dtype: Any, rhs_dtype: Any, out_dtype: Any, target: Target
) -> ForwardTiles | None:
    """The tiles with the least estimated time, or None if nothing fits into VMEM."""
    size, w_size, out_size = (jnp.dtype(d).itemsize for d in (lhs_dtype, rhs_dtype, out_dtype))
    fragment = _tpu_schedule.fragment_rows(lhs_dtype, out_dtype)
    macs = target.macs_per_cycle // (1 if size <= 2 else 6)
    stays = M <= MOST_STAYING_ROWS
    best = None
    for cols, runs in itertools.product(_column_tiles(N, _mxu_unit(N, target)), _runs(M, G, fragment, target)):
        if stays and best is not None and K * cols * w_size < LEAST_COPY_BYTES:
            continue
        long, short, _ = runs
        body_cols = _body_cols(cols, K, long, target)
        for rows in sorted({min(_round_up(r, long), _round_up(M, long)) for r in (256, 512, 1024)}):
            buffers = _buffers(rows, cols, K, long, size, w_size, out_size, target)
            if buffers is None:
                continue
            passes = -(-N // cols)
            compute = (M + G * short / 2) * K * passes * cols / macs
            compute *= 1 + _run_overhead(long, target) / (long * K * body_cols / macs)
            memory = (passes * (M * size + G * cols * w_size) * K + M * N * out_size) / target.bytes_per_cycle
            compute, memory = compute / target.num_cores, memory / target.num_cores  # cores divide the rows
            # A step costs about 150 cycles of bookkeeping, few if lhs stays. What bounds the kernel has to wait for its
            # first copies, or leaves its last tile to be multiplied; nothing overlaps the last copy.
            compute += passes * (M / rows + min(G, M)) * (20 if stays else 150) / target.num_cores
            first = (cols * w_size + rows * size) * K / target.bytes_per_cycle
            last = max(_round_up(min(rows, -(-M // G)), short), target.mxu_size) * K * cols / macs + _run_overhead(
                short, target
            )
            # With one row tile on its way besides the one in use, a short tile cannot hide the next one's copy.
            if buffers[1] < 3:
                compute, memory = 1.1 * compute, 1.1 * memory
            # The two overlap, but never wholly: groups differ. Groups of a few rows are all alike.
            time = max(compute + first, memory + last) + (0 if stays else 0.3) * min(compute, memory)
            time += min(rows, -(-M // G)) * cols * out_size / target.bytes_per_cycle
            if best is None or time < best[0]:
                best = time, rows, cols, runs, body_cols, buffers
    if best is None:
        return None
    lhs_stays = stays and M <= best[1]
    _, rows, cols, (long, short, short_runs), body_cols, (weights, lhs, out) = best
    return ForwardTiles(
        rows=rows,
        cols=cols,
        body_rows=(long, short),
        short_runs=min(short_runs, long // short - 1),
        body_cols=body_cols,
        weight_buffers=weights,
        usual_weights=min(3, weights),
        deep_rows=_deep_rows(K, cols, size, w_size, out_size, macs, target),
        least_rows=math.ceil(w_size * macs / target.bytes_per_cycle),
        lhs_buffers=1 if lhs_stays else lhs,
        lhs_stays=lhs_stays,
        out_buffers=out,
        zero_rows=min(256, _round_up(M, fragment)),
        vmem_limit_bytes=int(target.vmem_bytes * VMEM_LIMIT_SHARE),
    )


def _run_overhead(rows: int, target: Target) -> int:
    """Cycles to fill and drain the matrix units once, where they are not hidden.

    They are hidden where the units are slow enough for all else to keep up (128 wide), or add up by themselves.
    """
    if target.mxu_size == 128 or target.mxu_accumulates:
        return 0
    return 300 if rows >= 512 else 520


def _buffers(
    rows: int, cols: int, K: int, long: int, size: int, w_size: int, out_size: int, target: Target
) -> tuple[int, ...] | None:
    """(weights, lhs, out) buffers: two of each at least, then more for row tiles, and for weights what is left."""
    weight, lhs, out = K * cols * w_size, rows * K * size, rows * cols * out_size
    room = target.vmem_bytes * VMEM_SHARE - 4 * long * cols - 256 * cols * out_size
    counts = [2, 2, 2]
    used = lambda: counts[0] * weight + counts[1] * lhs + counts[2] * out
    if used() > room:
        return None
    for i, wanted in ((1, 3), (0, 3), (2, 3), (1, 4), (0, 8)):
        while counts[i] < wanted and used() + (weight, lhs, out)[i] <= room:
            counts[i] += 1
    return tuple(counts)


def _deep_rows(K: int, cols: int, size: int, w_size: int, out_size: int, macs: int, target: Target) -> int:
    """Rows after which a group has computed longer than its own copies take. Runs reach 0.9 of the peak."""
    spare = K * cols / macs / 0.9 - (K * size + cols * out_size) / target.bytes_per_cycle
    weights = K * cols * w_size / target.bytes_per_cycle
    return min(math.ceil(weights / spare), 2**30) if spare > 0 else 2**30


@dataclasses.dataclass(frozen=True)
class DrhsTiles:
    """How the kernel of the weights' gradient cuts its work.

    left_cols, right_cols: tile of the gradient.
    rows: row tile, a multiple of the long run.
    body_rows, body_cols: rows (in a long and a short run) and left columns of one straight run of the matrix units.
    zero_rows: rows of the buffer of zeros. Divides left_cols.
    """

    left_cols: int
    right_cols: int
    rows: int
    body_rows: tuple[int, int]
    body_cols: int
    row_buffers: int
    out_buffers: int
    zero_rows: int
    vmem_limit_bytes: int


def drhs_tiles(M: int, A: int, B: int, G: int, dtype: Any, target: Target) -> DrhsTiles | None:
    """The tiles with the least estimated time, or None if nothing fits into VMEM."""
    size, fragment = jnp.dtype(dtype).itemsize, _tpu_schedule.fragment_rows(dtype)
    long, short = (128, 128) if target.mxu_size == 128 else (512, 256) if target.mxu_accumulates else (256, 256)
    all_rows = _round_up(M, fragment)
    short = min(short, all_rows)
    long = min(long, _round_up(all_rows, short))
    macs = target.macs_per_cycle // (1 if size <= 2 else 6)
    room = target.vmem_bytes * VMEM_SHARE
    best = None
    # For narrow matrix units the compiler transposes left in blocks of 256 columns, and pads others.
    unit = 2 * LANES if target.mxu_size == LANES and A % (2 * LANES) == 0 else LANES
    for left in _column_tiles(A, unit):
        for right in _column_tiles(B, _mxu_unit(B, target)):
            for rows in sorted({min(_round_up(r, long), _round_up(all_rows, long)) for r in (256, 512, 1024)}):
                tile, row_tile = left * right, rows * (left + right) * size
                used = tile * (4 + 2 * size) + 3 * row_tile + 4 * 256 * right
                if used > room:
                    continue
                tiles_a, tiles_b = -(-A // left), -(-B // right)
                # Cores divide the tiles.
                tiles = -(-tiles_a * tiles_b // target.num_cores)
                body_cols = _drhs_body_cols(left, right, long, unit, target)
                compute = (M + G * short / 2) * tiles * tile / macs
                compute *= 1 + _run_overhead(long, target) / (long * body_cols * right / macs)
                memory = (M * (left + right) + G * tile) * tiles * size / target.bytes_per_cycle
                ends = (row_tile + tile * size) / target.bytes_per_cycle
                steps = tiles * (M / rows + min(G, M)) * 150
                time = max(compute, memory) + ends + steps
                if best is None or time < best[0]:
                    best = time, left, right, rows, body_cols, min(4, 3 + int((room - used) // row_tile))
    if best is None:
        return None
    _, left, right, rows, body_cols, row_buffers = best
    return DrhsTiles(
        left_cols=left,
        right_cols=right,
        rows=rows,
        body_rows=(long, short),
        body_cols=body_cols,
        row_buffers=row_buffers,
        out_buffers=2,
        zero_rows=next((z for z in (256, 128) if left % z == 0), left),
        vmem_limit_bytes=int(target.vmem_bytes * VMEM_LIMIT_SHARE),
    )


def _drhs_body_cols(left: int, right: int, rows: int, unit: int, target: Target) -> int:
    """The widest block of left's columns whose run isn't too long, or the narrowest.

    Adding to the sum keeps the store units busy, so longer runs gain less than in the forward kernel.
    """
    most = BODY_CYCLES * target.macs_per_cycle // (1 if target.mxu_size == 128 else 2)
    blocks = [c for c in range(unit, left + 1, unit) if left % c == 0] or [left]
    return max([c for c in blocks if rows * c * right <= most], default=blocks[0])
