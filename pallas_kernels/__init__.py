"""Grouped and routed linear algebra for conditional computation. Knows nothing of models.

One folder per op: the public function, a reference in plain jnp, and one file per implementation. Every op takes
`implementation=`: a name runs or raises, None chooses by platform (`_choose.py`).
"""

from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.low_rank import low_rank_matmul
from pallas_kernels.permute import combine_rows, gather_rows
from pallas_kernels.quantized import Quantized, quantize
from pallas_kernels.route_top_k import TopKRoutes, expert_positions, expert_rows, route_top_k
from pallas_kernels.routed_ffn import routed_ffn

__all__ = [
    "Quantized",
    "TopKRoutes",
    "combine_rows",
    "expert_ffn",
    "expert_positions",
    "expert_rows",
    "gather_rows",
    "grouped_matmul",
    "low_rank_matmul",
    "quantize",
    "routed_ffn",
    "route_top_k",
]
