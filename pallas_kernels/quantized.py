"""Weights in 8 bits with a float32 scale per output channel of each group: what the ops take in place of an array.

A matrix product needs no wide weights: sum_k x[k] * values[k, n] * scale[n] is the product with the values, times the
scale, in the float32 sum. The other way round (the gradient of the rows, which sums over n) the scale belongs to the
dim that is summed, and goes to the rows first.

Scales per block of the summed dim (128 x 128 and the like) would need one partial product per block, each scaled before
it is added: not taken; `dequantized` what has them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

#: dtype -> the largest value that quantize uses.
DTYPES = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """values * scale: one matrix per group. A pytree. Frozen: no op gives a gradient for it.

    values: (G, A, B), int8, float8_e4m3fn or float8_e5m2.
    scale: float32, (G, 1, B) if A is the dim that the matmul sums over, (G, A, 1) if B is, or (G, 1, 1).
    """

    values: Num[Array, "G A B"]
    scale: Float[Array, "G A|1 B|1"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Of the matrices."""
        return self.values.ndim

    @property
    def dtype(self) -> Any:
        """Of the values."""
        return self.values.dtype

    def dequantized(self, dtype: Any = jnp.float32) -> Float[Array, "G A B"]:
        """values * scale in float32 or wider, rounded once."""
        wide = jnp.promote_types(dtype, jnp.float32)
        return (self.values.astype(wide) * self.scale.astype(wide)).astype(dtype)


#: What ops take as weights.
Weights = Float[Array, "G A B"] | Quantized


def quantize(weights_GAB: Float[Array, "G A B"], dtype: Any = jnp.int8, *, axis: int = 1) -> Quantized:
    """Rounds each output channel of each group to `dtype`, its largest magnitude to the dtype's largest.

    Args:
      weights_GAB: one matrix per group.
      dtype: int8, float8_e4m3fn or float8_e5m2.
      axis: the dim that the matmul sums over: 1, or 2 for matrices that `grouped_matmul` takes with transpose_rhs.

    Raises ValueError for another dtype, rank or axis. A channel of zeros gets scale 1.
    """
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"quantize: dtype must be one of {', '.join(DTYPES)}, got {name}")
    if weights_GAB.ndim != 3 or axis not in (1, 2):
        raise ValueError(
            f"quantize: weights must have 3 dims (G A B) and axis be 1 or 2, got {weights_GAB.ndim} dims and {axis}"
        )
    most, wide = DTYPES[name], weights_GAB.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=axis, keepdims=True, initial=0)
    scale = jnp.where(largest > 0, largest / most, 1)
    values = jnp.clip(wide / scale, -most, most)
    return Quantized((jnp.round(values) if name == "int8" else values).astype(dtype), scale)


# --- for the implementations of the ops -------------------------------------------------------------------------------


def values(weights: Weights) -> Array:
    """The matrices without their scale."""
    return weights.values if isinstance(weights, Quantized) else weights


def scales(weights: Weights, inner: int) -> tuple[Array | None, Array | None]:
    """(inner, outer) scales of a matmul that sums over dim `inner` of the matrices: (G, K) of the rows that go in or
    (G, N) of those that come out; None for a factor 1.
    """
    if not isinstance(weights, Quantized):
        return None, None
    G, outer = weights.shape[0], 3 - inner
    if weights.scale.shape[inner] > 1:
        return weights.scale.reshape(G, weights.shape[inner]), None
    return None, jnp.broadcast_to(weights.scale.reshape(G, -1), (G, weights.shape[outer]))


def frozen(op: str, weights: Any) -> Any:
    """`weights` (a pytree that may have Quantized in it), of which the Quantized must not be differentiated."""
    is_quantized = lambda w: isinstance(w, Quantized)
    return jax.tree.map(lambda w: _frozen(op, w) if is_quantized(w) else w, weights, is_leaf=is_quantized)


def _frozen_forward(op: str, weights: Any) -> tuple[Any, None]:
    if weights.values.perturbed or weights.scale.perturbed:
        raise TypeError(
            f"{op}: quantized weights are frozen, a gradient was asked for: differentiate with respect to what "
            "trains only (the rows, adapters), or pass them through jax.lax.stop_gradient"
        )
    return Quantized(weights.values.value, weights.scale.value), None


_frozen = jax.custom_vjp(lambda _, weights: weights, nondiff_argnums=(0,))
_frozen.defvjp(_frozen_forward, lambda *_: (None,), symbolic_zeros=True)
