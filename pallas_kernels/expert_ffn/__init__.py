"""The feed-forward network of each expert on its rows, fused."""

from pallas_kernels.expert_ffn.api import ACTIVATIONS, expert_ffn

__all__ = ["ACTIVATIONS", "expert_ffn"]
