"""Rotary position embedding (arXiv 2104.09864), rotate-half pairing as in Hugging Face."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(x_BSNH: Float[Array, "B S N H"], positions_BS: Int[Array, "B S"], theta: float) -> Float[Array, "B S N H"]:
    """Rotates the pair (i, i + H/2) of each head by positions * theta^(-2i/H). Angles in float32 or wider."""
    half = x_BSNH.shape[-1] // 2
    wide = jnp.promote_types(x_BSNH.dtype, jnp.float32)
    frequency = theta ** (-jnp.arange(half, dtype=wide) / half)
    angle_BS1h = positions_BS[:, :, None, None].astype(wide) * frequency
    sin, cos = jnp.sin(angle_BS1h), jnp.cos(angle_BS1h)
    a, b = x_BSNH[..., :half].astype(wide), x_BSNH[..., half:].astype(wide)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BSNH.dtype)
