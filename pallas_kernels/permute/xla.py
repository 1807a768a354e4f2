"""Gathers as XLA ops, on every platform.

Dims as in api.py.
"""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _checks, _varying


def take(x_XD: Array, index: Array) -> Array:
    """x[index], zero where index is beyond the last row. Index has any shape."""
    X = x_XD.shape[0]
    if X == 0:
        return _varying.zeros_like_varying((*index.shape, *x_XD.shape[1:]), x_XD.dtype, x_XD)
    rows = jnp.asarray(x_XD).at[jnp.minimum(index, X - 1)].get(mode="promise_in_bounds")
    live = (index < X).reshape(index.shape + (1,) * (x_XD.ndim - 1))
    return jnp.where(live, rows, 0)


def sum_choices(y_RD: Array, slot_TK: Array, gates_TK: Array | None) -> Array:
    """sum over k of y[slot[:, k]], weighted. One gather per k: the (T, K, D) array is never made.

    Gates of dropped choices are not read.
    """
    dtype = _checks.accumulator(y_RD.dtype)
    if gates_TK is not None:
        gates_TK = jnp.where(slot_TK < y_RD.shape[0], gates_TK, 0)
    total_TD = _varying.zeros_like_varying((slot_TK.shape[0], y_RD.shape[1]), dtype, y_RD)
    for k in range(slot_TK.shape[1]):
        rows_TD = take(y_RD, slot_TK[:, k]).astype(dtype)
        total_TD = total_TD + (rows_TD if gates_TK is None else gates_TK[:, k, None].astype(dtype) * rows_TD)
    return total_TD.astype(y_RD.dtype)
