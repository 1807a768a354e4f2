"""Rotary position embedding (arXiv 2104.09864), its partial and interleaved forms, and how released models stretch it.

Pairs are (i, i + h) as in Hugging Face, or (2i, 2i + 1) as in the paper (`interleaved`). The stretches change the
frequencies of the h pairs so that a model trained on short texts reads long ones:
  linear    all divided by `factor`                                                      arXiv 2306.15595
  llama3    long wavelengths divided, short ones kept, a ramp between                    Llama 3.1
  yarn      the same with a ramp over dimensions; sin and cos times `attention_factor`   arXiv 2309.00071
  longrope  a divisor for every pair, other ones once a text is longer than the original context, arXiv 2402.13753
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive

Angles = tuple[Float[Array, "B 1 S h"], Float[Array, "B 1 S h"]]


@dataclasses.dataclass(frozen=True, order=True)
class RopeScaling:
    """`kind` and the numbers it needs, by Hugging Face's names; the others are not looked at.

    `attention_factor` multiplies sin and cos (yarn; longrope up to the original length, then `long_attention_factor`).
    """

    kind: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    long_attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def validate(self, path: str) -> None:
        positive(self, path, "factor", "original_max_position_embeddings", "attention_factor", "long_attention_factor")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(f"{join(path, 'low_freq_factor')}: expected less than high_freq_factor")
        if self.kind == "longrope" and not (self.short_factor and len(self.short_factor) == len(self.long_factor)):
            raise ConfigError(f"{join(path, 'long_factor')}: expected as many numbers as short_factor, one per pair")

    def frequencies(self, rotary_dim: int, theta: float) -> Float[np.ndarray, "h"]:
        """Radians per position of every pair, for all kinds but longrope's long texts."""
        plain = theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "llama3":
            turns = self.original_max_position_embeddings * plain / (2 * np.pi)
            keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        elif self.kind == "yarn":
            keep = 1 - self._ramp(rotary_dim, theta)
        elif self.kind == "longrope":
            return plain / np.asarray(self.short_factor)
        else:
            return plain
        keep = np.clip(keep, 0, 1)
        return keep * plain + (1 - keep) * plain / self.factor

    def _ramp(self, rotary_dim: int, theta: float) -> np.ndarray:
        """From 0 at the pair that turns beta_fast times in the original context to 1 at the one of beta_slow."""
        pair = lambda turns: (
            rotary_dim * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))
        )
        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        return (np.arange(rotary_dim // 2) - low) / (high - low if high != low else 0.001)


def angles(
    positions_BS: Int[Array, "B S"], H: int, theta: float, scaling: RopeScaling = RopeScaling(), dtype=jnp.float32
) -> Angles:
    """sin and cos of positions * theta^(-2i/H) for the H/2 pairs, or of `scaling`'s frequencies, in float32 or wider.

    Computed once per forward pass: in every layer it would cost as much as the rotation itself.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    half = H // 2
    at = positions_BS[:, None, :, None].astype(wide)
    if scaling.kind == "none":
        angle = at * theta ** (-jnp.arange(half, dtype=wide) / half)
        return _sin_cos(angle)
    frequency, size = jnp.asarray(scaling.frequencies(H, theta), wide), scaling.attention_factor
    if scaling.kind == "longrope":
        # one rule for the whole text, as it was trained: its length decides
        is_long = positions_BS.max(axis=1)[:, None, None, None] >= scaling.original_max_position_embeddings
        ratio = np.asarray(scaling.short_factor) / np.asarray(scaling.long_factor)
        frequency = jnp.where(is_long, frequency * jnp.asarray(ratio, wide), frequency)
        size = jnp.where(is_long, scaling.long_attention_factor, size).astype(wide)
    sin, cos = _sin_cos(at * frequency)
    return sin * size, cos * size


def _sin_cos(angle):
    """On a CPU by a loop, whose results lie in memory: XLA would compute them again inside everything that rotates, in
    each layer, forward and backward.
    """
    loop = lambda x: tuple(jax.lax.map(lambda i: jax.lax.cond(i == 0, jnp.sin, jnp.cos, x), jnp.arange(2)))
    return jax.lax.platform_dependent(angle, cpu=loop, default=lambda x: (jnp.sin(x), jnp.cos(x)))


def rotate(x_BNSH: Float[Array, "B N S H"], sin_cos: Angles, interleaved: bool = False) -> Float[Array, "B N S H"]:
    """Rotates the pair (i, i + h) of each head, or (2i, 2i + 1), by its angle; what is beyond 2h stays as it is."""
    sin, cos = sin_cos
    if not sin.shape[-1]:
        return x_BNSH
    half, dtype = sin.shape[-1], x_BNSH.dtype
    turned, rest = x_BNSH[..., : 2 * half].astype(sin.dtype), x_BNSH[..., 2 * half :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    pair = (a * cos - b * sin, b * cos + a * sin)
    out = jnp.stack(pair, -1).reshape(turned.shape) if interleaved else jnp.concatenate(pair, -1)
    return jnp.concatenate([out.astype(dtype), rest], -1) if rest.shape[-1] else out.astype(dtype)
