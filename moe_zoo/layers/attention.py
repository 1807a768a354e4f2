"""Causal self-attention: rotary positions, grouped queries, query-key norm, sliding window, key-value cache.

B batch, S query length, L key length, N query heads, M key-value heads, H head size, D model.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe_zoo.core.param import fan_in, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.layers.norm import RMSNorm
from moe_zoo.layers.rope import rotate

# Query rows per block of the parallel form: blocks see only the keys up to their end, which saves half the work.
_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """`head_dim` None: hidden_size / num_attention_heads. `qk_norm`: RMSNorm of q and k, per "head" (Qwen3) or over the
    "full" width before the split into heads (OLMoE). `sliding_window` w: a query sees itself and the w - 1 tokens before.
    """

    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    qk_norm: Literal["none", "head", "full"] = "none"
    sliding_window: int | None = None
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    def validate(self, path: str) -> None:
        positive(self, path, "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", "rope_theta")
        kv = self.num_key_value_heads
        if kv is not None and self.num_attention_heads % kv:
            raise ConfigError(f"{join(path, 'num_key_value_heads')}: {kv} does not divide num_attention_heads={self.num_attention_heads}")
        if self.head_dim is not None and self.head_dim % 2:
            raise ConfigError(f"{join(path, 'head_dim')}: {self.head_dim} is odd; rotary positions need pairs")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """Who may see whom: positions for rotary angles and order, segments that do not see each other, validity."""

    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"] | None = None
    valid: Bool[Array, "B S"] | None = None


class Attention(nnx.Module):
    """Softmax attention with its own cache."""

    Config = AttentionConfig

    def __init__(self, config: AttentionConfig, *, hidden_size: int, out_scale: float):
        D, N = hidden_size, config.num_attention_heads
        M = config.num_key_value_heads or N
        H = config.head_dim or D // N
        self.config, self.dims = config, (D, N, M, H)
        self.q = param((D, N, H), ("embed", "heads", "head_dim"), fan_in(D))
        self.k = param((D, M, H), ("embed", "kv_heads", "head_dim"), fan_in(D))
        self.v = param((D, M, H), ("embed", "kv_heads", "head_dim"), fan_in(D))
        self.o = param((N, H, D), ("heads", "head_dim", "embed"), fan_in(N * H, out_scale))
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = RMSNorm(N * H if full else H, config.norm_eps, axis="qk_norm")
            self.k_norm = RMSNorm(M * H if full else H, config.norm_eps, axis="qk_norm")

    def init_cache(self, batch: int, max_seq: int, dtype) -> dict:
        """Keys, values and who they are, for `max_seq` tokens."""
        D, N, M, H = self.dims
        return {
            "k": jnp.zeros((batch, max_seq, M, H), dtype),
            "v": jnp.zeros((batch, max_seq, M, H), dtype),
            "positions": jnp.zeros((batch, max_seq), jnp.int32),
            "valid": jnp.zeros((batch, max_seq), bool),
        }

    def __call__(self, x_BSD: Float[Array, "B S D"], view: View, cache: dict | None = None, at=None):
        """Returns (output, cache). With a cache, the S new tokens are written at index `at` and see all before them."""
        D, N, M, H = self.dims
        B, S, _ = x_BSD.shape
        q_BSNH, k_BSMH, v_BSMH = self._project(x_BSD)
        theta = self.config.rope_theta
        q_BSNH, k_BSMH = rotate(q_BSNH, view.positions, theta), rotate(k_BSMH, view.positions, theta)
        if cache is None:
            out = self._parallel(q_BSNH, k_BSMH, v_BSMH, view)
        else:
            cache = self._append(cache, k_BSMH, v_BSMH, view, at)
            mask_BSL = self._ordered(view.positions, cache["positions"]) & cache["valid"][:, None, :]
            out = attend(q_BSNH, cache["k"], cache["v"], mask_BSL)
        o = self.o[...].astype(x_BSD.dtype).reshape(N * H, D)
        return out.reshape(B, S, N * H) @ o, cache

    def _project(self, x_BSD):
        """q, k, v by one dot: at these sizes a CPU core reaches its peak only on wide matrices."""
        D, N, M, H = self.dims
        B, S, _ = x_BSD.shape
        w = jnp.concatenate([p[...].reshape(D, -1).astype(x_BSD.dtype) for p in (self.q, self.k, self.v)], axis=1)
        q, k, v = jnp.split(x_BSD @ w, [N * H, (N + M) * H], axis=-1)
        if self.config.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.reshape(B, S, N, H), k.reshape(B, S, M, H), v.reshape(B, S, M, H)
        if self.config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _append(self, cache, k_BSMH, v_BSMH, view, at):
        valid = jnp.ones(view.positions.shape, bool) if view.valid is None else view.valid
        new = {"k": k_BSMH, "v": v_BSMH, "positions": view.positions, "valid": valid}
        return {
            name: jax.lax.dynamic_update_slice_in_dim(old, new[name].astype(old.dtype), at, axis=1) for name, old in cache.items()
        }

    def _ordered(self, query_BS, key_BL):
        distance_BSL = query_BS[:, :, None] - key_BL[:, None, :]
        mask = distance_BSL >= 0
        return mask if self.config.sliding_window is None else mask & (distance_BSL < self.config.sliding_window)

    def _parallel(self, q, k, v, view):
        outs, S = [], q.shape[1]
        for start in range(0, S, _BLOCK):
            end, first = min(start + _BLOCK, S), 0
            if self.config.sliding_window is not None and view.segment_ids is None and view.valid is None:
                first = max(0, start - self.config.sliding_window + 1)
            keys, queries = slice(first, end), slice(start, end)
            mask = self._ordered(view.positions[:, queries], view.positions[:, keys])
            # positions restart with each packed document: order within the row must hold as well
            mask &= jnp.arange(start, end)[:, None] >= jnp.arange(first, end)
            if view.segment_ids is not None:
                mask &= view.segment_ids[:, queries, None] == view.segment_ids[:, None, keys]
            if view.valid is not None:
                mask &= view.valid[:, None, keys]
            outs.append(attend(q[:, queries], k[:, keys], v[:, keys], mask))
        return jnp.concatenate(outs, axis=1) if len(outs) > 1 else outs[0]

    def flops_per_token(self, context: float) -> float:
        """Projections, and scores and mixing over `context` visible keys on average. Forward, multiply-adds count two."""
        D, N, M, H = self.dims
        if self.config.sliding_window is not None:
            context = min(context, self.config.sliding_window)
        return 2 * D * H * (2 * N + 2 * M) + 4 * N * H * context


def attend(
    q_BSNH: Float[Array, "B S N H"], k_BLMH: Float[Array, "B L M H"], v_BLMH: Float[Array, "B L M H"], mask_BSL: Bool[Array, "B S L"]
) -> Float[Array, "B S N H"]:
    """softmax(q k / sqrt(H)) v over the allowed keys. Softmax in float32. A query that may see nothing averages all."""
    B, S, N, H = q_BSNH.shape
    M = k_BLMH.shape[2]
    q = (q_BSNH / math.sqrt(H)).reshape(B, S, M, N // M, H)
    scores = jnp.einsum("bsmgh,blmh->bmgsl", q, k_BLMH.astype(q.dtype))
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    mask = mask_BSL[:, None, None]
    lowest = jnp.finfo(scores.dtype).min
    weights = jax.nn.softmax(jnp.where(mask, scores, lowest), axis=-1).astype(q.dtype)
    return jnp.einsum("bmgsl,blmh->bsmgh", weights, v_BLMH.astype(q.dtype)).reshape(B, S, N, H)
