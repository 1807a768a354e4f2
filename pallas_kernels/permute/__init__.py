"""Tokens to rows and back, without a scatter in either direction or derivative."""

from pallas_kernels.permute.api import combine_rows, gather_rows

__all__ = ["combine_rows", "gather_rows"]
