"""Tile sizes of the TPU kernels of the grouped matmul: formulas of the shape and the target, no table."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """rows, cols: tile of the output. body_rows, body_cols: what one straight run of the matrix units multiplies."""

    rows: int
    cols: int
    body_rows: tuple[int, ...]
    body_cols: int
    weight_buffers: int
    usual_weights: int
    deep_rows: int
    lhs_buffers: int
    out_buffers: int
    zero_rows: int
    vmem_limit_bytes: int

    def num_col_tiles(self, N: int) -> int:
        return -(-N // self.cols)


def forward_tiles(M, K, N, G, dtype, out_dtype, target):
    raise NotImplementedError
