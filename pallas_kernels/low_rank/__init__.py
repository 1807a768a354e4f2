"""Many low-rank matrices, mixed token by token: the product of mixtures of LoRA."""

from pallas_kernels.low_rank.api import low_rank_matmul
from pallas_kernels.low_rank.xla import from_ranks, grouped_pays, to_ranks

__all__ = ["from_ranks", "grouped_pays", "low_rank_matmul", "to_ranks"]
