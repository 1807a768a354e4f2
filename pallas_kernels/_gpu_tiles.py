"""Tile sizes of the GPU kernels, by formula: from the shape and the device's shared memory.

Powers of two, as Triton asks. Loads of the next `stages - 1` steps of the inner dim are on their way while one is
multiplied, so one step's tiles must fit into shared memory `stages` times.
"""

import dataclasses

from pallas_kernels._gpu_target import Target

#: Tensor cores take at least this many of each dim.
LEAST = 16


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`rows` x `cols` of the result per program, `inner` of the summed dim per step.

    width: tiles side by side in the order of programs (`_gpu_schedule.swizzled`).
    """

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int
    width: int = 8


def row_tiles(M: int, K: int, N: int, G: int, itemsize: int, target: Target, *, rhs: int = 1, sums: int = 1) -> Tiles:
    """Tiles of a matmul of rows by their group's matrices.

    Rows: half a mean group, so that what its last tile wastes stays small; columns: what registers hold, all `sums`
    together. `rhs` matrices are loaded per step.
    """
    rows = min(max(_power_below(M // (2 * G)), LEAST), 128 if itemsize == 2 else 64)
    wide = itemsize == 2 and target.multiplies_from_shared and rows == 128
    cols = min((256 if wide else 128 if itemsize == 2 else 64) // sums, max(_power_above(N), LEAST))
    inner = min(64 if itemsize == 2 and target.shared_bytes >= 128 * 1024 else 32, max(_power_above(K), LEAST))
    warps = _warps(rows * cols * sums, target)
    return Tiles(rows, cols, inner, warps, _stages(itemsize * inner * (rows + rhs * cols), target))


def weight_tiles(M: int, A: int, B: int, G: int, itemsize: int, target: Target, *, gathers: bool = False) -> Tiles:
    """Tiles of a sum over each group's rows: `rows` of A, `cols` of B, `inner` rows per step.

    A gather's loads follow those of their indices, so that every step of theirs takes two stages.
    """
    wide = itemsize == 2 and target.multiplies_from_shared
    most = 128 if itemsize == 2 else 64
    rows, cols = min(most, max(_power_above(A), LEAST)), min(256 if wide else most, max(_power_above(B), LEAST))
    inner = min(64 if itemsize == 2 and target.shared_bytes >= 128 * 1024 else 32, max(_power_below(M // G), LEAST))
    warps = _warps(rows * cols, target)
    stages = _stages(itemsize * inner * (rows + cols), target)
    return Tiles(rows, cols, inner, warps, 2 * stages - 1 if gathers else stages)


def _warps(numbers: int, target: Target) -> int:
    """For this many sums: 128 per thread, or 64 if operands are in registers, too."""
    return 8 if numbers > 4 * 32 * (128 if target.multiplies_from_shared else 64) else 4


def _stages(step_bytes: int, target: Target) -> int:
    return max(2, min(4, target.shared_bytes // step_bytes))


def _power_below(n: int) -> int:
    return 1 << max(n.bit_length() - 1, 0)


def _power_above(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
