"""Tile sizes of the expert network's TPU kernels: formulas of the shape and the target, no table."""

import dataclasses

from pallas_kernels._tpu_rows import Tiles
from pallas_kernels._tpu_target import MIB, Target

#: Cycles of the matrix units in one straight run of code: enough to hide its start and end, few enough to compile fast.
BODY_CYCLES = 4096
OUT_BUFFERS = 2


@dataclasses.dataclass(frozen=True)
class Shape:
    """A call of the row kernel. R rows, K inner, N columns, G groups; how many arrays of each kind; bytes a number.

    weight_itemsize: bytes of a number of the weights.
    """

    R: int
    K: int
    N: int
    G: int
    num_rows: int
    num_weights: int
    num_sides: int
    num_outs: int
    itemsize: int
    weight_itemsize: int
    pack_outs: bool = False


def tiles(shape: Shape, target: Target) -> Tiles:
    """The column tile with the least estimated time: rows are read, and the last tile's overlap computed, once more."""
    limit = target.vmem_bytes - 8 * MIB
    body = _body_rows(shape, target)
    fit = _fit(shape, body[0], limit, target)
    while fit is None and body[1] > 16:
        body = body[0] // 2, body[1] // 2
        fit = _fit(shape, body[0], limit, target)
    if fit is None:
        raise ValueError(f"no tiles of {shape} fit into the vector memory of {target.name}")
    rows, cols, weight_buffers, row_buffers = fit
    body_cols = _body_cols(shape, body[0], cols, target)
    return Tiles(
        rows=rows,
        cols=cols,
        body_rows=body,
        body_cols=body_cols,
        weight_buffers=weight_buffers,
        usual_weights=3,
        deep_rows=rows,
        row_buffers=row_buffers,
        out_buffers=OUT_BUFFERS,
        zero_rows=128,
        gather_rows=min(256, max(2 * body[0] * body_cols // cols // 8 * 8, 8)),
        vmem_limit_bytes=limit,
    )


def _body_rows(shape: Shape, target: Target) -> tuple[int, ...]:
    """A matrix unit wants as many rows as it has, unless the groups are smaller."""
    mean = max(shape.R // shape.G, 1)
    long = min(max(32, 1 << (mean - 1).bit_length()), target.mxu_size)
    return long, long // 2


def _fit(shape: Shape, body: int, limit: int, target: Target) -> tuple[int, int, int, int] | None:
    """(rows, cols, weight buffers, row buffers): the least estimated time, then as much room for copies ahead."""
    few = min(max(shape.R // 2, body), 512) // body * body
    rooms = ((few, 3, 3), (body, 3, 3), (few, 2, 3), (body, 2, 3), (body, 2, 2))
    best, least = None, float("inf")
    for cols in _widths(shape, target):
        time = _time(shape, body, cols, target)
        for rows, *buffers in rooms:
            if _bytes(shape, rows, cols, *buffers, body) <= limit:
                if time < least:
                    best, least = (rows, cols, *buffers), time
                break
    return best


def _widths(s: Shape, target: Target) -> list[int]:
    """For each number of column tiles the narrowest that cover N; only divisors if outputs are packed."""
    unit = _unit(s, target)
    if s.N % unit:
        return [s.N]
    units = s.N // unit
    counts = (n for n in range(1, units + 1) if not s.pack_outs or units % n == 0)
    widths = sorted({-(-units // n) * unit for n in counts}, reverse=True)
    # Half a matrix unit, at full cost, where memory holds no more.
    return widths if s.pack_outs and s.itemsize == 2 else [*widths, 128]


def _time(s: Shape, body: int, cols: int, target: Target) -> float:
    """Cycles: of the matrix units, where a straight run costs some hundred to fill and drain, or of the HBM."""
    passes, unit = -(-s.N // cols), min(_unit(s, target), s.N)
    run = body * s.K * _body_cols(s, body, cols, target) * s.num_weights / target.macs_per_cycle
    compute = s.R * s.K * passes * max(cols, unit) * s.num_weights / target.macs_per_cycle * (1 + 300 / run)
    numbers = passes * s.num_rows * s.R * s.K + s.R * s.N * (s.num_sides + s.num_outs)
    weights = s.G * s.K * s.N * s.num_weights
    return max(compute, (s.itemsize * numbers + s.weight_itemsize * weights) / target.bytes_per_cycle)


def _unit(s: Shape, target: Target) -> int:
    """Columns come in whole matrix units if they can, and packed ones in pairs of lanes."""
    return 256 if s.N % 256 == 0 and (s.pack_outs or target.mxu_size == 256) else 128


def _bytes(s: Shape, rows: int, cols: int, weight_buffers: int, row_buffers: int, body: int) -> int:
    """VMEM: the buffers, and room for the products of a body in float32."""
    # Packed or not: gathered rows lie in VMEM once more.
    per_row = s.K + row_buffers * (s.num_rows * s.K + s.num_sides * cols) + OUT_BUFFERS * s.num_outs * cols
    weights = weight_buffers * s.num_weights * s.K * cols
    numbers = weights * s.weight_itemsize + rows * per_row * s.itemsize
    return numbers + 4 * body * cols * (s.num_weights + s.num_outs)


def _body_cols(s: Shape, body: int, cols: int, target: Target) -> int:
    """The most columns, dividing `cols`, that keep a body within BODY_CYCLES."""
    unit = _unit(s, target)
    if cols % unit:
        return cols
    fits = lambda n: body * s.K * n * unit * s.num_weights <= BODY_CYCLES * target.macs_per_cycle
    units = cols // unit
    return max((n * unit for n in range(1, units + 1) if units % n == 0 and fits(n)), default=unit)
