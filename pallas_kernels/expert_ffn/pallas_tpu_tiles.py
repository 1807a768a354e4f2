"""Tile sizes of the expert network's TPU kernels: formulas of the shape and the target, no table."""

import dataclasses

from pallas_kernels._tpu_rows import Tiles
from pallas_kernels._tpu_target import MIB, Target


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


def tiles(shape: Shape, target: Target) -> Tiles:
    """The widest column tile that fits: rows are read once per column tile."""
    mean = max(shape.R // shape.G, 1)
    body = min(max(16, 1 << (mean - 1).bit_length()), target.mxu_size)
    rows = body * max(1, min(512, shape.R) // body)
    limit = target.vmem_bytes - 8 * MIB
    cols = shape.N
    for count in range(1, shape.N // 128 + 1):
        cols = -(-shape.N // count // 128) * 128 if shape.N % 128 == 0 else shape.N
        if _bytes(shape, rows, cols, 2) <= limit:
            break
    return Tiles(
        rows=rows,
        cols=cols,
        body_rows=(body,),
        body_cols=cols if cols % 512 else 512,
        weight_buffers=3 if _bytes(shape, rows, cols, 3) <= limit else 2,
        row_buffers=3,
        out_buffers=2,
        zero_rows=128,
        vmem_limit_bytes=limit,
    )


def _bytes(s: Shape, rows: int, cols: int, weight_buffers: int) -> int:
    numbers = weight_buffers * s.num_weights * s.K * cols + rows * (
        3 * (s.num_rows * s.K + s.num_sides * cols) + 2 * s.num_outs * cols
    )
    body = 4 * 256 * cols * (s.num_weights + s.num_outs)
    return numbers * s.itemsize + body
