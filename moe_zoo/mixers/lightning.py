"""Lightning attention (arXiv 2401.04658) as MiniMax-01 (arXiv 2501.08313) has it: a fixed decay per head and layer.

    q, k, v = silu(W x);   S_t = exp(-s) S_{t-1} + k_t v_t^T;   y = W_o (sigmoid(W_g x) * norm(S_t^T q_t))
    s = 2^(-8 h / H) (1 - l / (L - 1)),  heads h = 1..H, layers l = 0..L-1: later layers forget less

B batch, S sequence, D model, H heads of N, L layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.core.param import fan_in, param
from moe_zoo.core.schema import positive
from moe_zoo.layers.norm import RMSNorm
from moe_zoo.mixers.linear_attention import linear_attention
from moe_zoo.mixers.mixer import Mixer, Span


@dataclasses.dataclass(frozen=True)
class LightningConfig:
    """Heads and their size. `norm_eps`: of the norm over all heads."""

    num_heads: int = 4
    head_dim: int = 64
    norm_eps: float = 1e-6

    def validate(self, path: str) -> None:
        positive(self, path, "num_heads", "head_dim", "norm_eps")


def slopes(num_heads: int, num_layers: int, layer) -> Float[Array, "H"]:
    """s of each head; the small numbers are those of the released model."""
    heads = 2.0 ** (-8 * (jnp.arange(num_heads) + 1) / num_heads)
    return heads * (1 - layer / (num_layers - 1 + 1e-5) + 1e-5)


class Lightning(Mixer):
    """Lightning attention: linear attention that forgets at a fixed rate."""

    Config = LightningConfig

    def __init__(self, config: LightningConfig, *, hidden_size: int, out_scale: float, num_layers: int):
        D, H, N = hidden_size, config.num_heads, config.head_dim
        self.config, self.dims, self.num_layers = config, (D, H, N), num_layers
        for name in ("w_q", "w_k", "w_v", "gate"):
            setattr(self, name, param((D, H, N), ("embed", "heads", "head_dim"), fan_in(D)))
        self.norm = RMSNorm(H * N, config.norm_eps, axis="heads")
        self.out = param((H, N, D), ("heads", "head_dim", "embed"), fan_in(H * N, out_scale))

    @classmethod
    def build(cls, config, attention, *, hidden_size: int, out_scale: float, num_layers: int):
        """As `Mixer`."""
        return cls(config, hidden_size=hidden_size, out_scale=out_scale, num_layers=num_layers)

    def init_cache(self, batch: int, max_seq: int, dtype) -> dict:
        """A matrix per head, in float32 or wider."""
        _, H, N = self.dims
        return {"state": jnp.zeros((batch, H, N, N), jnp.promote_types(dtype, jnp.float32))}

    def mix(self, x_BSD, span: Span, state: dict):
        """As `Mixer`."""
        D, H, N = self.dims
        B, S, _ = x_BSD.shape
        dtype = x_BSD.dtype
        w = jnp.concatenate([p[...].reshape(D, -1) for p in (self.w_q, self.w_k, self.w_v)], axis=1)
        qkv = jax.nn.silu(x_BSD @ w.astype(dtype))
        q, k, v = (t.reshape(B, S, H, N) for t in jnp.split(qkv, 3, axis=-1))
        log_decay = jnp.broadcast_to(-slopes(H, self.num_layers, span.layer), (B, S, H))
        if span.valid is not None:
            k, log_decay = jnp.where(span.valid[..., None, None], k, 0), jnp.where(span.valid[..., None], log_decay, 0)
        y, matrix = linear_attention(q, k, v, log_decay, state["state"], span.documents)
        y = self.norm(y.reshape(B, S, H * N).astype(dtype))
        y = y * jax.nn.sigmoid(x_BSD @ self.gate[...].reshape(D, -1).astype(dtype))
        return y @ self.out[...].reshape(H * N, D).astype(dtype), {"state": matrix}

    def flops_per_token(self, context: float) -> float:
        """Projections, and per head two products with the state (write, read)."""
        D, H, N = self.dims
        return 2 * 5 * D * H * N + 4 * H * N * N
