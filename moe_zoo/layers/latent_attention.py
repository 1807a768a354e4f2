"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values grow out of one small vector per token.

    c = norm(x W_a[:, :R]);  k_rot = rope(x W_a[:, R:]), one for all heads
    [k_n | v] = c W_b;  scores = q_n k_n + rope(q_r) k_rot

The cache holds c and k_rot only. B batch, S query length, L key length, N heads, R latent width.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.core.param import fan_in, param
from moe_zoo.layers.attention import Attention, AttentionConfig, RotaryKey, View, write
from moe_zoo.layers.norm import RMSNorm
from moe_zoo.layers.rope import rotate
from moe_zoo.layers.tap import Tap, untouched


class LatentAttention(Attention):
    """Softmax attention over keys and values from a latent; queries from one too, if `q_lora_rank` is given."""

    Config = AttentionConfig
    linears = {"q": 1, "q_a": 1, "q_b": 1, "kv_a": 1, "kv_b": 1, "o": 2}

    def __init__(self, config: AttentionConfig, *, hidden_size: int, out_scale: float):
        D, N, c = hidden_size, config.num_attention_heads, config.latent
        H, R = config.query_size(D), c.kv_lora_rank
        self.config, self.dims = config, (D, N, N, H)
        if c.q_lora_rank:
            self.q_a = param((D, c.q_lora_rank), ("embed", None), fan_in(D))
            self.q_norm = RMSNorm(c.q_lora_rank, config.norm_eps, axis="qk_norm")
            self.q_b = param((c.q_lora_rank, N, H), (None, "heads", "head_dim"), fan_in(c.q_lora_rank))
        else:
            self.q = param((D, N, H), ("embed", "heads", "head_dim"), fan_in(D))
        self.kv_a = param((D, R + c.qk_rope_head_dim), ("embed", None), fan_in(D))
        self.kv_norm = RMSNorm(R, config.norm_eps, axis="qk_norm")
        self.kv_b = param((R, N, c.qk_nope_head_dim + c.v_head_dim), (None, "heads", "head_dim"), fan_in(R))
        self.o = param((N, c.v_head_dim, D), ("heads", "head_dim", "embed"), fan_in(N * c.v_head_dim, out_scale))

    @property
    def rotary_key(self) -> RotaryKey:
        rotated = 0 if self.config.rotary_dim == 0 else self.config.latent.qk_rope_head_dim
        return rotated, self.config.rope_theta, self.config.rope_scaling

    def init_cache(self, batch: int, max_seq: int, dtype) -> dict:
        """The latent and the rotated key part of `max_seq` tokens, and who they are."""
        c = self.config.latent
        return {
            "latent": jnp.zeros((batch, max_seq, c.kv_lora_rank), dtype),
            "rotated": jnp.zeros((batch, max_seq, c.qk_rope_head_dim), dtype),
            "positions": jnp.zeros((batch, max_seq), jnp.int32),
            "valid": jnp.zeros((batch, max_seq), bool),
        }

    def observed(
        self, x_BSD: Float[Array, "B S D"], view: View, cache: dict | None = None, at=None, tap: Tap = untouched
    ):
        """Returns (output, cache, AttentionView), as `Attention`."""
        c, sin_cos = self.config.latent, view.rotary[self.rotary_key]
        turn = lambda x: rotate(x, sin_cos, self.config.rope_interleaved)
        q = self._queries(x_BSD, tap) * c.q_scale
        q = jnp.concatenate([q[..., : c.qk_nope_head_dim], turn(q[..., c.qk_nope_head_dim :])], -1)
        both = self._linear("kv_a", x_BSD, tap)
        latent = self.kv_norm(both[..., : c.kv_lora_rank]) * c.kv_scale
        rotated = turn(both[:, None, :, c.kv_lora_rank :])[:, 0]
        if cache is not None:
            valid = jnp.ones(view.positions.shape, bool) if view.valid is None else view.valid
            new = {"latent": latent, "rotated": rotated, "positions": view.positions, "valid": valid}
            cache = {name: write(old, new[name], at, 1) for name, old in cache.items()}
            latent, rotated = (cache[name].astype(q.dtype) for name in ("latent", "rotated"))
        k, v = self._expand(latent, rotated, tap)
        sight = self._sight(view, cache, at)
        out = self._mix(q, k, v, sight)
        B, N, S, V = out.shape
        out = self._linear("o", out.transpose(0, 2, 1, 3).reshape(B, S, N * V), tap)
        return out, cache, self._seen(q, k, v, out, sight)

    def _queries(self, x_BSD, tap: Tap):
        H = self.dims[3]
        if not self.config.latent.q_lora_rank:
            return _heads(self._linear("q", x_BSD, tap), H)
        return _heads(self._linear("q_b", self.q_norm(self._linear("q_a", x_BSD, tap)), tap), H)

    def _expand(self, latent_BLR, rotated_BLr, tap: Tap):
        """Keys and values of every head."""
        N, c = self.dims[1], self.config.latent
        nope = c.qk_nope_head_dim
        both = _heads(self._linear("kv_b", latent_BLR, tap), nope + c.v_head_dim)
        B, _, L, _ = both.shape
        shared = jnp.broadcast_to(rotated_BLr[:, None], (B, N, L, rotated_BLr.shape[-1]))
        return jnp.concatenate([both[..., :nope], shared], -1), both[..., nope:]

    def _linear(self, name: str, x, tap: Tap):
        """x [..., in] through the weight of that name, its dims flat."""
        w = getattr(self, name)[...].astype(x.dtype).reshape(x.shape[-1], -1)
        return tap(name, x, x @ w, w)

    def flops_per_token(self, context: float) -> float:
        """Projections, scores and mixing over `context` visible keys on average. Forward; multiply-adds count two."""
        D, N, _, H = self.dims
        c = self.config.latent
        queries = c.q_lora_rank * (D + N * H) if c.q_lora_rank else D * N * H
        keys = D * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank * N * (c.qk_nope_head_dim + c.v_head_dim)
        return 2 * (queries + keys + N * c.v_head_dim * D) + 2 * N * (H + c.v_head_dim) * self._visible(context)


def _heads(x_BSX: Float[Array, "B S NH"], H: int) -> Float[Array, "B N S H"]:
    B, S, _ = x_BSX.shape
    return x_BSX.reshape(B, S, -1, H).transpose(0, 2, 1, 3)
