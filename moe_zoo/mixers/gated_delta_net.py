"""Gated DeltaNet (arXiv 2412.06464) as Qwen3-Next and Qwen3.5 have it.

    q, k, v = silu(conv([W_q x | W_k x | W_v x]));   beta = sigmoid(W_b x);   g = -exp(A) softplus(W_a x + b_dt)
    y = W_o (norm(delta_rule(q / |q| / sqrt(N), k / |k|, v, beta, g)) * silu(W_z x))

B batch, S sequence, D model, G key heads, H = G r value heads, N key size, P value size, K taps.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from moe_zoo.core.param import Constant, Uniform, fan_in, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.layers.norm import RMSNorm
from moe_zoo.mixers.conv import causal_conv
from moe_zoo.mixers.delta_rule import delta_rule, unit
from moe_zoo.mixers.init import LogUniform
from moe_zoo.mixers.mixer import Mixer, Span


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig:
    """`num_value_heads` heads over `num_key_heads` of keys. `projections`: one matrix for q, k, v and z of each key
    head ("grouped", Qwen3-Next) or one for q, k, v and others for z, b, a ("split", Qwen3.5).
    """

    num_key_heads: int = 4
    num_value_heads: int = 4
    key_head_dim: int = 32
    value_head_dim: int = 32
    conv_kernel: int = 4
    projections: Literal["grouped", "split"] = "split"
    norm_eps: float = 1e-6

    def validate(self, path: str) -> None:
        sizes = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel", "norm_eps")
        positive(self, path, *sizes)
        if self.num_value_heads % self.num_key_heads:
            raise ConfigError(
                f"{join(path, 'num_value_heads')}: {self.num_value_heads} is no multiple of "
                f"num_key_heads={self.num_key_heads}"
            )


class GatedDeltaNet(Mixer):
    """Gated DeltaNet: a state that forgets, and corrects what it says about a key."""

    Config = GatedDeltaNetConfig

    def __init__(self, config: GatedDeltaNetConfig, *, hidden_size: int, out_scale: float):
        c, D = config, hidden_size
        G, H, N, P = c.num_key_heads, c.num_value_heads, c.key_head_dim, c.value_head_dim
        r, channels = H // G, 2 * G * N + H * P
        self.config, self.dims = config, (D, G, H, N, P)
        if c.projections == "grouped":
            self.in_qkvz = param((D, G, 2 * N + 2 * r * P), ("embed", "heads", None), fan_in(D))
            self.in_ba = param((D, G, 2 * r), ("embed", "heads", None), fan_in(D))
        else:
            self.in_qkv = param((D, channels), ("embed", None), fan_in(D))
            self.in_z = param((D, H, P), ("embed", "heads", None), fan_in(D))
            self.in_b = param((D, H), ("embed", "heads"), fan_in(D))
            self.in_a = param((D, H), ("embed", "heads"), fan_in(D))
        self.conv = param((channels, c.conv_kernel), ("channels", None), Uniform(c.conv_kernel**-0.5))
        self.dt_bias = param((H,), ("heads",), Constant(1.0))
        self.A_log = param((H,), ("heads",), LogUniform(0.01, 16.0))
        self.norm = RMSNorm(P, c.norm_eps, axis="head_dim")
        self.out = param((H, P, D), ("heads", None, "embed"), fan_in(H * P, out_scale))

    def init_cache(self, batch: int, max_seq: int, dtype) -> dict:
        """The last inputs of the convolution; a matrix per head, in float32 or wider."""
        _, G, H, N, P = self.dims
        conv = jnp.zeros((batch, self.config.conv_kernel - 1, 2 * G * N + H * P), dtype)
        return {"conv": conv, "state": jnp.zeros((batch, H, N, P), jnp.promote_types(dtype, jnp.float32))}

    def mix(self, x_BSD, span: Span, state: dict):
        """As `Mixer`."""
        D, G, H, N, P = self.dims
        B, S, _ = x_BSD.shape
        qkv, z, b, a = self._project(x_BSD)
        qkv, conv = causal_conv(qkv, self.conv[...], None, span, state["conv"])
        q, k, v = jnp.split(jax.nn.silu(qkv), [G * N, 2 * G * N], axis=-1)
        q, k = (jnp.repeat(unit(t.reshape(B, S, G, N)), H // G, axis=2) for t in (q, k))
        wide = jnp.promote_types(x_BSD.dtype, jnp.float32)
        beta = jax.nn.sigmoid(b.astype(wide))
        log_decay = -jnp.exp(self.A_log[...].astype(wide)) * jax.nn.softplus(a.astype(wide) + self.dt_bias[...])
        if span.valid is not None:
            beta, log_decay = (jnp.where(span.valid[..., None], t, 0) for t in (beta, log_decay))
        v = v.reshape(B, S, H, P)
        y, matrix = delta_rule(q * N**-0.5, k, v, beta, log_decay, state["state"], span.documents)
        y = self.norm(y.astype(x_BSD.dtype)) * jax.nn.silu(z.astype(wide)).astype(x_BSD.dtype)
        out = y.reshape(B, S, H * P) @ self.out[...].reshape(H * P, D).astype(x_BSD.dtype)
        return out, {"conv": conv, "state": matrix}

    def _project(self, x_BSD):
        """q, k, v side by side as the convolution sees them; z [B S H P]; b, a [B S H]."""
        D, G, H, N, P = self.dims
        B, S, _ = x_BSD.shape
        r = H // G
        through = lambda w: x_BSD @ w[...].reshape(D, -1).astype(x_BSD.dtype)
        if self.config.projections == "split":
            return through(self.in_qkv), through(self.in_z).reshape(B, S, H, P), through(self.in_b), through(self.in_a)
        each = through(self.in_qkvz).reshape(B, S, G, -1)
        q, k, v, z = jnp.split(each, [N, 2 * N, 2 * N + r * P], axis=-1)
        b, a = jnp.split(through(self.in_ba).reshape(B, S, G, 2 * r), 2, axis=-1)
        qkv = jnp.concatenate([t.reshape(B, S, -1) for t in (q, k, v)], -1)
        return qkv, z.reshape(B, S, H, P), b.reshape(B, S, H), a.reshape(B, S, H)

    def flops_per_token(self, context: float) -> float:
        """Projections, convolution, and per head three products with the state (read, correct, write)."""
        D, G, H, N, P = self.dims
        channels = 2 * G * N + H * P
        return 2 * D * (channels + 2 * H * P + 2 * H) + 2 * channels * self.config.conv_kernel + 6 * H * N * P
