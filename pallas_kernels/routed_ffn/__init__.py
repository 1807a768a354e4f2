"""The feed-forward network of each expert on the tokens routed to it: gather, compute and combine in one op."""

from pallas_kernels.routed_ffn.api import routed_ffn

__all__ = ["routed_ffn"]
