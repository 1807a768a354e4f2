"""RMSNorm (arXiv 1910.07467) and LayerNorm, statistics in float32 or wider; and which norm goes where."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moe_zoo.core.param import Constant, param
from moe_zoo.layers.tanh_norm import BHyT, DyT, Place, PredictingBHyT, TanhNormConfig

NormKind = Literal["rms", "rms_plus_one", "layer", "layer_no_bias", "dyt", "dyt_no_bias", "bhyt", "bhyt_star"]


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


#: those that know nothing of their place
NORMS = {
    "rms": RMSNorm,
    "rms_plus_one": RMSNormPlusOne,
    "layer": LayerNorm,
    "layer_no_bias": functools.partial(LayerNorm, bias=False),
}


def make_norm(
    kind: NormKind, size: int, eps: float, place: Place, config: TanhNormConfig, predicted: float | None = None
) -> nnx.Module:
    """The norm of that kind for a place. `predicted`: the scale of the initial values of the branch before it, if it is
    the second of a block in which "bhyt" predicts its mean square; None: it is measured.
    """
    if kind in NORMS:
        return NORMS[kind](size, eps)
    if kind in ("dyt", "dyt_no_bias"):
        return DyT(size, getattr(config, f"alpha_{place}"), bias=kind == "dyt")
    slope = getattr(config, f"lambda_{place}")
    if slope == 0:
        return RMSNorm(size, eps)
    if kind == "bhyt" and predicted is not None:
        return PredictingBHyT(size, eps, config, predicted)
    return BHyT(size, eps, slope, config.kappa)
