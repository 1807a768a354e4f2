"""Tile sizes of the expert network's TPU kernels: formulas of the shape and the target, no table."""

import dataclasses

from pallas_kernels._tpu_rows import Tiles
from pallas_kernels._tpu_target import MIB, Target

#: Cycles of the matrix units in one straight run of code: enough to hide its start and end, few enough to compile fast.
BODY_CYCLES = 4096


@dataclasses.dataclass(frozen=True)
class Shape:
    """A call of the row kernel. R rows, K inner, N columns, G groups; how many arrays of each kind; bytes a number."""

    R: int
    K: int
    N: int
    G: int
    num_rows: int
    num_weights: int
    num_sides: int
    num_outs: int
    itemsize: int
    pack_outs: bool = False


def tiles(shape: Shape, target: Target) -> Tiles:
    """The widest column tile that fits: rows are read once per column tile."""
    limit = target.vmem_bytes - 8 * MIB
    body = _body_rows(shape, target)
    rows, cols, weight_buffers = _fit(shape, body[0], limit)
    body_cols = _body_cols(shape, body[0], cols, target)
    return Tiles(
        rows=rows,
        cols=cols,
        body_rows=body,
        body_cols=body_cols,
        weight_buffers=weight_buffers,
        usual_weights=3,
        deep_rows=rows,
        row_buffers=ROW_BUFFERS,
        out_buffers=OUT_BUFFERS,
        zero_rows=128,
        gather_rows=min(256, max(2 * body[0] * body_cols // cols // 8 * 8, 8)),
        vmem_limit_bytes=limit,
    )


ROW_BUFFERS, OUT_BUFFERS = 3, 2


def _body_rows(shape: Shape, target: Target) -> tuple[int, ...]:
    """A matrix unit wants as many rows as it has, unless the groups are smaller."""
    mean = max(shape.R // shape.G, 1)
    long = min(max(32, 1 << (mean - 1).bit_length()), target.mxu_size)
    return long, long // 2


def _fit(shape: Shape, body: int, limit: int) -> tuple[int, int, int]:
    """(rows, cols, weight buffers): as few column tiles as possible, then as much room for copies ahead."""
    few = min(max(shape.R // 2, body), 512) // body * body
    lanes = max(shape.N // 128, 1)
    for count in range(1, lanes + 1):
        if shape.pack_outs and lanes % (2 * count):
            continue
        cols = -(-lanes // count) * 128 if shape.N % 128 == 0 else shape.N
        for rows, weight_buffers in ((few, 3), (body, 3), (few, 2), (body, 2)):
            if _bytes(shape, rows, cols, weight_buffers, body) <= limit:
                return rows, cols, weight_buffers
    return body, min(shape.N, 128), 2


def _bytes(s: Shape, rows: int, cols: int, weight_buffers: int, body: int) -> int:
    """VMEM: the buffers, and room for the products of a body in float32."""
    per_row = ROW_BUFFERS * (s.num_rows * s.K + s.num_sides * cols) + OUT_BUFFERS * s.num_outs * cols
    numbers = weight_buffers * s.num_weights * s.K * cols + rows * per_row
    return numbers * s.itemsize + 4 * body * cols * (s.num_weights + s.num_outs)


def _body_cols(s: Shape, body: int, cols: int, target: Target) -> int:
    """The most columns, dividing `cols`, that keep a body within BODY_CYCLES."""
    lanes, step = cols // 128, 2 if s.pack_outs else 1
    fits = lambda n: body * s.K * n * 128 * s.num_weights <= BODY_CYCLES * target.macs_per_cycle
    counts = range(step, lanes + 1, step)
    return max((n * 128 for n in counts if lanes % n == 0 and fits(n)), default=step * 128) if lanes else cols
