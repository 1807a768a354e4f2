"""Counting choices inside a TPU kernel: experts along sublanes (E), tokens along lanes (W of a strip at a time).

How many earlier tokens of a strip chose an expert is a product of ones and zeros with a triangular matrix: exact in
float32, and the matrix unit's work. Ids are float32 here: vector units before v6e have no integer minimum.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

LANES, SUBLANES = 128, 8
#: Counts are exact in float32 up to here.
MOST_CHOICES = 1 << 24
#: Rows of a strip that are told apart one by one in the program, not by a loop.
_MOST_UNROLLED = 8


def round_up(n: int, multiple: int) -> int:
    """n, or the next multiple above it."""
    return -(-n // multiple) * multiple


def strip_lanes(E: int, T: int) -> int:
    """Lanes per strip: as many as leave one number per expert and token in half the vector registers."""
    lanes = (1 << 15) // round_up(E, SUBLANES) // LANES * LANES
    return min(max(LANES, min(4 * LANES, lanes)), round_up(T, LANES))


def for_each_strip(block: int, strip: int, body: Callable[[Array, Any], None]) -> None:
    """body(number of the strip within the block, its lanes)"""

    def step(s: Array, _: None) -> None:
        body(s, pl.ds(pl.multiple_of(s * strip, strip), strip))

    jax.lax.fori_loop(0, block // strip, step, None)


def for_each_k(k: int, body: Callable[[Any, Any], Any], carry: Any = None) -> Any:
    """carry = body(i, carry) for i < k; unrolled, with i an int, for the usual few experts per token."""
    if k > _MOST_UNROLLED:
        return jax.lax.fori_loop(0, k, body, carry)
    for i in range(k):
        carry = body(i, carry)
    return carry


def row(rows: Any, k: Any) -> Array:
    """Row k. A traced k may lie anywhere within a sublane tile, which only a mask can address."""
    if isinstance(k, int):
        return rows[k : k + 1]
    return sum_where(jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0) == k, rows[...])


def put_row(rows: Any, k: Any, row_1W: Array) -> None:
    """rows[k] = row"""
    if isinstance(k, int):
        rows[k : k + 1] = row_1W
    else:
        rows[...] = jnp.where(jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0) == k, row_1W, rows[...])


def expert_iota(shape: tuple[int, int]) -> Array:
    """The id of each sublane's expert."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0).astype(jnp.float32)


def hits(expert_1W: Array, E: int) -> Array:
    """Whether a lane's token chose an expert."""
    return expert_iota((E, expert_1W.shape[1])) == expert_1W


def sum_where(hit_EW: Array, value_EW: Array) -> Array:
    """The value of each lane's chosen expert."""
    return jnp.sum(jnp.where(hit_EW, value_EW, 0.0), axis=0, keepdims=True)


def earlier(count_EW: Array) -> Array:
    """Sums over the lanes before each one, of bools or of counts up to 256."""
    return _dot(_exact(count_EW), _triangle(count_EW.shape[1]), (1, 0))


def total(count_EW: Array) -> Array:
    """Sums over all lanes, in every lane."""
    W = count_EW.shape[1]
    return _dot(_exact(count_EW), jnp.ones((W, W), jnp.bfloat16), (1, 0))


def total_as_row(count_EW: Array) -> Array:
    """Sums over all lanes, experts along lanes."""
    return _dot(jnp.ones((1, count_EW.shape[1]), jnp.bfloat16), _exact(count_EW), (1, 1))


def lower_experts(count_EW: Array) -> Array:
    """Sums over the experts before each one, of counts below 2**24: in three digits that bfloat16 holds exactly."""
    count_EW = count_EW.astype(jnp.int32)
    digits = [(count_EW >> shift) & 255 for shift in (0, 8, 16)]
    below_EE = _triangle(count_EW.shape[0])
    sums = [_dot(below_EE, _exact(digit), (0, 0)) for digit in digits]
    return sums[0] + 256.0 * sums[1] + 65536.0 * sums[2]


def _triangle(n: int) -> Array:
    """1 where the row comes before the column."""
    at = functools.partial(jax.lax.broadcasted_iota, jnp.int32, (n, n))
    return _exact(at(0) < at(1))


def _exact(count: Array) -> Array:
    return count.astype(jnp.float32).astype(jnp.bfloat16)


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
