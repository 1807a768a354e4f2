"""Rotary position embedding (arXiv 2104.09864), rotate-half pairing as in Hugging Face."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Angles = tuple[Float[Array, "B 1 S h"], Float[Array, "B 1 S h"]]


def angles(positions_BS: Int[Array, "B S"], H: int, theta: float, dtype=jnp.float32) -> Angles:
    """sin and cos of positions * theta^(-2i/H) for the H/2 pairs of a head, in float32 or wider.

    Computed once per forward pass: in every layer it would cost as much as the rotation itself.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    half = H // 2
    angle = positions_BS[:, None, :, None].astype(wide) * theta ** (-jnp.arange(half, dtype=wide) / half)
    return jnp.sin(angle), jnp.cos(angle)


def rotate(x_BNSH: Float[Array, "B N S H"], sin_cos: Angles) -> Float[Array, "B N S H"]:
    """Rotates the pair (i, i + H/2) of each head by its angle."""
    sin, cos = sin_cos
    half = x_BNSH.shape[-1] // 2
    a, b = x_BNSH[..., :half].astype(sin.dtype), x_BNSH[..., half:].astype(sin.dtype)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BNSH.dtype)
