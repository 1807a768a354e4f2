"""Argument checks shared by the ops: they name what was given and what was expected."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.quantized import DTYPES, Quantized


def describe(**arrays: Any) -> str:
    """`x f32[8,4], w int8[2,4,6] * f32[2,1,6]`: for error messages."""
    text = lambda a: f"{a.dtype}{list(a.shape)}"
    whole = lambda a: f"{text(a.values)} * {text(a.scale)}" if isinstance(a, Quantized) else text(a)
    return ", ".join(f"{name} {whole(a)}" for name, a in arrays.items() if a is not None)


def check_rank(op: str, name: str, array: Any, dims: str) -> None:
    expected = len(dims.split())
    if array.ndim != expected:
        raise ValueError(
            f"{op}: {name} must have {expected} dims ({dims}), got {array.ndim}: {describe(**{name: array})}"
        )


def check_equal(op: str, what: str, given: int, expected: int, shapes: str) -> None:
    if given != expected:
        raise ValueError(f"{op}: {what}: got {given}, expected {expected}. Given: {shapes}")


def check_same_float_dtype(op: str, shapes: str, **arrays: Any) -> None:
    """Of all but quantized weights, which are checked by themselves."""
    dtypes = {}
    for name, a in arrays.items():
        if isinstance(a, Quantized):
            _check_quantized(op, name, a, shapes)
        elif a is not None:
            dtypes[name] = a.dtype
    if any(not jnp.issubdtype(d, jnp.floating) for d in dtypes.values()) or len(set(dtypes.values())) != 1:
        raise TypeError(
            f"{op}: {', '.join(dtypes)} must share one floating dtype (cast where you call it, so that it shows). "
            f"Given: {shapes}"
        )


def _check_quantized(op: str, name: str, weights: Quantized, shapes: str) -> None:
    if weights.dtype.name not in DTYPES or weights.scale.dtype != jnp.float32:
        raise TypeError(
            f"{op}: quantized {name} must have values of {', '.join(DTYPES)} and a float32 scale. Given: {shapes}"
        )
    G, A, B = weights.shape
    if weights.scale.shape not in ((G, 1, B), (G, A, 1), (G, 1, 1)):
        raise ValueError(
            f"{op}: the scale of quantized {name} must have shape {[G, 1, B]} or {[G, A, 1]}, one number per output "
            f"channel, or {[G, 1, 1]}. Given: {shapes}"
        )


def check_groups(op: str, sizes: Any, num_groups: int, offset: Any, shapes: str) -> None:
    """Without an offset there is one size per group; with one, at least as many sizes as groups."""
    check_rank(op, "group_sizes", sizes, "G")
    check_integer(op, "group_sizes", sizes, shapes)
    if num_groups < 1:
        raise ValueError(f"{op}: at least one group is needed, got 0. Given: {shapes}")
    if offset is None:
        check_equal(op, "length of group_sizes", sizes.shape[0], num_groups, shapes)
        return
    check_integer(op, "group_offset", offset, shapes)
    if offset.ndim != 0:
        raise ValueError(f"{op}: group_offset must be a scalar, got shape {list(offset.shape)}. Given: {shapes}")
    if sizes.shape[0] < num_groups:
        raise ValueError(
            f"{op}: with group_offset, group_sizes lists all groups: got {sizes.shape[0]}, expected at least "
            f"{num_groups}. Given: {shapes}"
        )


def check_integer(op: str, name: str, array: Any, shapes: str) -> None:
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{op}: {name} must be an integer array, got {array.dtype}. Given: {shapes}")


def accumulator(dtype: Any) -> Any:
    """Sums run in float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)


def check_shape(op: str, name: str, array: Any, expected: tuple[int, ...], shapes: str) -> None:
    if array.shape != expected:
        raise ValueError(f"{op}: {name} must have shape {list(expected)}, got {list(array.shape)}. Given: {shapes}")
