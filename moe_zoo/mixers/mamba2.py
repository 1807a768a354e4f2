"""Mamba-2 (arXiv 2405.21060) as Granite 4 and Nemotron-H have it.

    [z | x B C | dt] = W_in u;   x, B, C = silu(conv(x B C));   dt = softplus(dt + b_dt)
    S_t = exp(-exp(A) dt_t) S_{t-1} + dt_t B_t x_t^T;   y_t = S_t^T C_t + d x_t;   out = W_out norm(y * silu(z))

The norm is over each group of channels.
B batch, S sequence, D model, G groups, H heads, N state size, P head size, K taps.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moe_zoo.core.param import Constant, Uniform, fan_in, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.mixers.conv import causal_conv
from moe_zoo.mixers.init import LogUniform, TimeStep
from moe_zoo.mixers.linear_attention import linear_attention
from moe_zoo.mixers.mixer import Mixer, Span


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """`num_groups`: heads of one group share B and C. `dt_min`: step sizes are at least this."""

    num_heads: int = 8
    head_dim: int = 64
    num_groups: int = 1
    state_size: int = 64
    conv_kernel: int = 4
    conv_bias: bool = True
    proj_bias: bool = False
    dt_min: float = 0.0
    norm_eps: float = 1e-6

    def validate(self, path: str) -> None:
        positive(self, path, "num_heads", "head_dim", "num_groups", "state_size", "conv_kernel", "norm_eps")
        positive(self, path, "dt_min", zero=True)
        if self.num_heads % self.num_groups:
            raise ConfigError(
                f"{join(path, 'num_heads')}: {self.num_heads} is no multiple of num_groups={self.num_groups}"
            )


class Mamba2(Mixer):
    """Mamba-2: a matrix per head that forgets at a rate that depends on the token."""

    Config = Mamba2Config

    def __init__(self, config: Mamba2Config, *, hidden_size: int, out_scale: float):
        c, D = config, hidden_size
        H, inner = c.num_heads, c.num_heads * c.head_dim
        channels = inner + 2 * c.num_groups * c.state_size
        self.config, self.dims = config, (D, inner, channels)
        self.in_proj = param((D, inner + channels + H), ("embed", None), fan_in(D))
        self.conv = param((channels, c.conv_kernel), ("channels", None), Uniform(c.conv_kernel**-0.5))
        if c.conv_bias:
            self.conv_bias = param((channels,), (None,), Constant(0.0))
        if c.proj_bias:
            self.in_bias = param((inner + channels + H,), (None,), Constant(0.0))
            self.out_bias = param((D,), ("embed",), Constant(0.0))
        self.dt_bias = param((H,), ("heads",), TimeStep())
        self.A_log = param((H,), ("heads",), LogUniform(1.0, 16.0))
        self.skip = param((H,), ("heads",), Constant(1.0))
        self.norm = param((inner,), ("mlp",), Constant(1.0))
        self.out = param((inner, D), ("mlp", "embed"), fan_in(inner, out_scale))

    def init_cache(self, batch: int, max_seq: int, dtype) -> dict:
        """The last inputs of the convolution; a matrix per head, in float32 or wider."""
        c = self.config
        shape = (batch, c.num_heads, c.state_size, c.head_dim)
        return {
            "conv": jnp.zeros((batch, c.conv_kernel - 1, self.dims[2]), dtype),
            "state": jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32)),
        }

    def mix(self, x_BSD, span: Span, state: dict):
        """As `Mixer`."""
        c, (_, inner, channels) = self.config, self.dims
        B, S, _ = x_BSD.shape
        H, P, G, N = c.num_heads, c.head_dim, c.num_groups, c.state_size
        dtype = x_BSD.dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        both = x_BSD @ self.in_proj[...].astype(dtype)
        if c.proj_bias:
            both = both + self.in_bias[...].astype(dtype)
        z, xbc, dt = jnp.split(both, [inner, inner + channels], axis=-1)
        bias = self.conv_bias[...] if c.conv_bias else None
        xbc, conv = causal_conv(xbc, self.conv[...], bias, span, state["conv"])
        x, b, q = jnp.split(jax.nn.silu(xbc), [inner, inner + G * N], axis=-1)
        x, b, q = x.reshape(B, S, H, P).astype(wide), b.reshape(B, S, G, N), q.reshape(B, S, G, N)
        dt = jax.nn.softplus(dt.astype(wide) + self.dt_bias[...])
        dt = jnp.maximum(dt, c.dt_min) if c.dt_min else dt
        if span.valid is not None:
            dt = jnp.where(span.valid[..., None], dt, 0)
        decay = -jnp.exp(self.A_log[...].astype(wide)) * dt
        y, matrix = linear_attention(q, b, x * dt[..., None], decay, state["state"], span.documents)
        y = y + x * self.skip[...].astype(wide)[:, None]
        y = y.reshape(B, S, inner) * jax.nn.silu(z.astype(wide))
        y = self._normed(y).astype(dtype) * self.norm[...].astype(dtype)
        out = y @ self.out[...].astype(dtype)
        if c.proj_bias:
            out = out + self.out_bias[...].astype(dtype)
        return out, {"conv": conv, "state": matrix}

    def _normed(self, y_BSI):
        grouped = y_BSI.reshape(*y_BSI.shape[:2], self.config.num_groups, -1)
        mean = jnp.mean(grouped * grouped, -1, keepdims=True)
        return (grouped * jax.lax.rsqrt(mean + self.config.norm_eps)).reshape(y_BSI.shape)

    def flops_per_token(self, context: float) -> float:
        """Projections, convolution, and per head two products with the state (write, read)."""
        c, (D, inner, channels) = self.config, self.dims
        weights = math.prod(self.in_proj.get_value().shape[-2:]) + inner * D + channels * c.conv_kernel
        return 2 * weights + 4 * inner * c.state_size
