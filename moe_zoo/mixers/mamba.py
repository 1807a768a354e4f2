"""Mamba (arXiv 2312.00752) as Jamba (arXiv 2403.19887) has it, with norms of what the step size, B and C come from.

    [x | z] = W_in u;   x = silu(conv(x));   [t | B | C] = W_x x;   dt = softplus(W_dt norm(t) + b_dt)
    h_t = exp(-exp(A) dt_t) h_{t-1} + dt_t x_t norm(B_t)^T;   y_t = h_t norm(C_t) + d x_t;   out = W_out (y * silu(z))

B batch, S sequence, D model, I inner channels, N state size of each, R rank of the step size, K taps.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_zoo.core.param import Constant, Uniform, fan_in, param
from moe_zoo.core.schema import positive
from moe_zoo.layers.norm import RMSNorm
from moe_zoo.mixers.conv import causal_conv
from moe_zoo.mixers.init import LogRange, TimeStep
from moe_zoo.mixers.mixer import Mixer, Span
from moe_zoo.mixers.selective_scan import selective_scan


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """`expand`: inner channels per hidden one. `dt_rank` None: hidden_size / 16, rounded up. `norms`: of t, B and C."""

    expand: int = 2
    state_size: int = 16
    dt_rank: int | None = None
    conv_kernel: int = 4
    conv_bias: bool = True
    proj_bias: bool = False
    norms: bool = True
    norm_eps: float = 1e-6

    def validate(self, path: str) -> None:
        positive(self, path, "expand", "state_size", "dt_rank", "conv_kernel", "norm_eps")

    def rank(self, hidden_size: int) -> int:
        """R."""
        return self.dt_rank or -(-hidden_size // 16)


class Mamba(Mixer):
    """Mamba: a small diagonal state per channel, whose step size depends on the token."""

    Config = MambaConfig

    def __init__(self, config: MambaConfig, *, hidden_size: int, out_scale: float):
        c, D = config, hidden_size
        I, N, R = c.expand * D, c.state_size, c.rank(D)  # noqa: E741
        self.config, self.dims = config, (D, I, N, R)
        self.in_x = param((D, I), ("embed", "mlp"), fan_in(D))
        self.in_z = param((D, I), ("embed", "mlp"), fan_in(D))
        self.conv = param((I, c.conv_kernel), ("channels", None), Uniform(c.conv_kernel**-0.5))
        if c.conv_bias:
            self.conv_bias = param((I,), ("mlp",), Constant(0.0))
        if c.proj_bias:
            self.in_x_bias = param((I,), ("mlp",), Constant(0.0))
            self.in_z_bias = param((I,), ("mlp",), Constant(0.0))
            self.out_bias = param((D,), ("embed",), Constant(0.0))
        self.x_proj = param((I, R + 2 * N), ("mlp", None), fan_in(I))
        self.dt_proj = param((R, I), (None, "mlp"), Uniform(R**-0.5))
        self.dt_bias = param((I,), ("mlp",), TimeStep())
        self.A_log = param((I, N), ("channels", None), LogRange())
        self.skip = param((I,), ("mlp",), Constant(1.0))
        if c.norms:
            self.dt_norm = RMSNorm(R, c.norm_eps, axis="head_dim")
            self.b_norm = RMSNorm(N, c.norm_eps, axis="head_dim")
            self.c_norm = RMSNorm(N, c.norm_eps, axis="head_dim")
        self.out = param((I, D), ("mlp", "embed"), fan_in(I, out_scale))

    def init_cache(self, batch: int, max_seq: int, dtype) -> dict:
        """The last inputs of the convolution; the states of all channels, in float32 or wider."""
        _, I, N, _ = self.dims  # noqa: E741
        return {
            "conv": jnp.zeros((batch, self.config.conv_kernel - 1, I), dtype),
            "state": jnp.zeros((batch, I, N), jnp.promote_types(dtype, jnp.float32)),
        }

    def mix(self, x_BSD, span: Span, state: dict):
        """As `Mixer`."""
        c, (_, _, N, R), dtype = self.config, self.dims, x_BSD.dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        x, z = (x_BSD @ w[...].astype(dtype) for w in (self.in_x, self.in_z))
        if c.proj_bias:
            x, z = x + self.in_x_bias[...].astype(dtype), z + self.in_z_bias[...].astype(dtype)
        bias = self.conv_bias[...] if c.conv_bias else None
        x, conv = causal_conv(x, self.conv[...], bias, span, state["conv"])
        x = jax.nn.silu(x)
        t, b, q = jnp.split(x @ self.x_proj[...].astype(dtype), [R, R + N], axis=-1)
        if c.norms:
            t, b, q = self.dt_norm(t), self.b_norm(b), self.c_norm(q)
        dt = jax.nn.softplus((t @ self.dt_proj[...].astype(dtype)).astype(wide) + self.dt_bias[...])
        if span.valid is not None:
            dt = jnp.where(span.valid[..., None], dt, 0)
        A = -jnp.exp(self.A_log[...].astype(wide))
        y, states = selective_scan(x, dt, A, b, q, state["state"], span.documents)
        y = (y + x.astype(wide) * self.skip[...]) * jax.nn.silu(z.astype(wide))
        out = y.astype(dtype) @ self.out[...].astype(dtype)
        if c.proj_bias:
            out = out + self.out_bias[...].astype(dtype)
        return out, {"conv": conv, "state": states}

    def flops_per_token(self, context: float) -> float:
        """Projections, convolution, and six operations on each number of the states."""
        D, I, N, R = self.dims  # noqa: E741
        return 2 * I * (3 * D + 2 * R + 2 * N + self.config.conv_kernel) + 6 * I * N
