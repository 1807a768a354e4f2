"""RMSNorm (arXiv 1910.07467) and LayerNorm. Statistics in float32 or wider."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moe_zoo.core.param import Constant, param

NormKind = Literal["rms", "rms_plus_one", "layer", "layer_no_bias"]


def rms(x, eps: float):
    """x / rms(x) over the last axis, in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis."""

    def __init__(self, size: int, eps: float, axis: str = "embed"):
        self.eps = eps
        self.scale = param((size,), (axis,), Constant(1.0))

    def __call__(self, x):
        return (rms(x, self.eps) * self.scale[...]).astype(x.dtype)


class RMSNormPlusOne(nnx.Module):
    """x / rms(x) * (1 + scale): the scale is 0 where nothing was learned (Gemma, Qwen3-Next)."""

    def __init__(self, size: int, eps: float, axis: str = "embed"):
        self.eps = eps
        self.scale = param((size,), (axis,), Constant(0.0))

    def __call__(self, x):
        normed = rms(x, self.eps)
        return (normed * (1 + self.scale[...].astype(normed.dtype))).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias over the last axis."""

    def __init__(self, size: int, eps: float, axis: str = "embed", bias: bool = True):
        self.eps = eps
        self.scale = param((size,), (axis,), Constant(1.0))
        if bias:
            self.bias = param((size,), (axis,), Constant(0.0))

    def __call__(self, x):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - wide.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + self.eps)
        scaled = normed * self.scale[...]
        return (scaled + self.bias[...] if hasattr(self, "bias") else scaled).astype(x.dtype)


NORMS = {
    "rms": RMSNorm,
    "rms_plus_one": RMSNormPlusOne,
    "layer": LayerNorm,
    "layer_no_bias": functools.partial(LayerNorm, bias=False),
}
