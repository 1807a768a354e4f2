"""Kimi Delta Attention (arXiv 2510.26692): the delta rule with a decay of its own for every component of the key.

    q, k, v = silu(conv(W x)) each;   beta = sigmoid(W_b x);   g = -exp(A) softplus(W_f2 W_f1 x + b_dt)
    y = W_o (norm(delta_rule(q / |q| / sqrt(N), k / |k|, v, beta, g)) * sigmoid(W_g2 W_g1 x))

B batch, S sequence, D model, H heads of N, K taps.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_zoo.core.param import Uniform, fan_in, param
from moe_zoo.core.schema import positive
from moe_zoo.layers.norm import RMSNorm
from moe_zoo.mixers.conv import causal_conv
from moe_zoo.mixers.delta_rule import delta_rule, unit
from moe_zoo.mixers.init import LogUniform, TimeStep
from moe_zoo.mixers.mixer import Mixer, Span


@dataclasses.dataclass(frozen=True)
class KimiDeltaConfig:
    """Sizes; keys and values are as wide as a head, the two matrices of the decay and the gate meet at that width."""

    num_heads: int = 4
    head_dim: int = 32
    conv_kernel: int = 4
    norm_eps: float = 1e-6

    def validate(self, path: str) -> None:
        positive(self, path, "num_heads", "head_dim", "conv_kernel", "norm_eps")


class KimiDelta(Mixer):
    """Kimi Delta Attention: Gated DeltaNet that forgets component by component."""

    Config = KimiDeltaConfig

    def __init__(self, config: KimiDeltaConfig, *, hidden_size: int, out_scale: float):
        D, H, N, K = hidden_size, config.num_heads, config.head_dim, config.conv_kernel
        self.config, self.dims = config, (D, H, N)
        for name in "qkv":
            setattr(self, name, param((D, H, N), ("embed", "heads", "head_dim"), fan_in(D)))
            setattr(self, f"conv_{name}", param((H * N, K), ("channels", None), Uniform(K**-0.5)))
        self.b = param((D, H), ("embed", "heads"), fan_in(D))
        for name in "fg":
            setattr(self, f"{name}_a", param((D, N), ("embed", None), fan_in(D)))
            setattr(self, f"{name}_b", param((N, H, N), (None, "heads", "head_dim"), fan_in(N)))
        self.dt_bias = param((H, N), ("channels", "head_dim"), TimeStep())
        self.A_log = param((H,), ("heads",), LogUniform(1.0, 16.0))
        self.norm = RMSNorm(N, config.norm_eps, axis="head_dim")
        self.o = param((H, N, D), ("heads", "head_dim", "embed"), fan_in(H * N, out_scale))

    def init_cache(self, batch: int, max_seq: int, dtype) -> dict:
        """The last inputs of the convolutions; a matrix per head, in float32 or wider."""
        _, H, N = self.dims
        return {
            "conv": jnp.zeros((batch, self.config.conv_kernel - 1, 3 * H * N), dtype),
            "state": jnp.zeros((batch, H, N, N), jnp.promote_types(dtype, jnp.float32)),
        }

    def mix(self, x_BSD, span: Span, state: dict):
        """As `Mixer`."""
        D, H, N = self.dims
        B, S, _ = x_BSD.shape
        dtype = x_BSD.dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        w, kernel = (
            jnp.concatenate([getattr(self, prefix + name)[...].reshape(-1, *shape) for name in "qkv"], axis=axis)
            for prefix, shape, axis in (("", (H * N,), 1), ("conv_", (self.config.conv_kernel,), 0))
        )
        qkv, conv = causal_conv(x_BSD @ w.astype(dtype), kernel, None, span, state["conv"])
        q, k, v = (t.reshape(B, S, H, N) for t in jnp.split(jax.nn.silu(qkv), 3, axis=-1))
        low_rank = lambda name: jnp.einsum(
            "bsr,rhn->bshn",
            x_BSD @ getattr(self, f"{name}_a")[...].astype(dtype),
            getattr(self, f"{name}_b")[...].astype(dtype),
        ).astype(wide)
        rate = jnp.exp(self.A_log[...].astype(wide))[:, None]
        log_decay = -rate * jax.nn.softplus(low_rank("f") + self.dt_bias[...].astype(wide))
        beta = jax.nn.sigmoid((x_BSD @ self.b[...].astype(dtype)).astype(wide))
        if span.valid is not None:
            beta = jnp.where(span.valid[..., None], beta, 0)
            log_decay = jnp.where(span.valid[..., None, None], log_decay, 0)
        y, matrix = delta_rule(unit(q) * N**-0.5, unit(k), v, beta, log_decay, state["state"], span.documents)
        y = (self.norm(y) * jax.nn.sigmoid(low_rank("g"))).astype(dtype)
        return jnp.einsum("bshn,hnd->bsd", y, self.o[...].astype(dtype)), {"conv": conv, "state": matrix}

    def flops_per_token(self, context: float) -> float:
        """Projections, convolutions, and per head three products with the state (read, correct, write)."""
        D, H, N = self.dims
        return 2 * D * (4 * H * N + H + 2 * N) + 4 * N * H * N + 6 * H * N * self.config.conv_kernel + 6 * H * N * N
