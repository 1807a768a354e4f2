"""Causal self-attention: rotary positions, grouped queries, query-key norm, sliding window, key-value cache.

B batch, S query length, L key length, N query heads, M key-value heads, H head size, D model.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe_zoo.core.context import AttentionView
from moe_zoo.core.param import Constant, fan_in, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.core.sight import Sight
from moe_zoo.layers.attend import attend, attend_causally
from moe_zoo.layers.norm import RMSNorm
from moe_zoo.layers.rope import Angles, RopeScaling, angles, rotate
from moe_zoo.layers.tap import Tap, untouched


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (`layers/latent_attention.py`); `kv_lora_rank` 0: none. `q_lora_rank` 0: queries
    straight from the hidden state.
    """

    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128

    def validate(self, path: str) -> None:
        positive(self, path, "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        positive(self, path, "kv_lora_rank", "q_lora_rank", zero=True)
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"{join(path, 'qk_rope_head_dim')}: {self.qk_rope_head_dim} is odd; rotation needs pairs")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """`head_dim` None: hidden_size / num_attention_heads. `qk_norm`: RMSNorm of q and k, per "head" (Qwen3) or over
    the "full" width before the split into heads (OLMoE). `sliding_window` w: a query sees itself and the w - 1 tokens
    before it. `qkv_bias`, `output_bias`: biases of the projections. `rotary_dim`: how much of a head is rotated, None
    for all; `rope_interleaved`: in pairs (2i, 2i + 1). `softmax_scale` multiplies the scores, None: 1/sqrt(head_dim).
    `sinks`: one learned logit per head beside the keys, which takes weight and adds nothing (gpt-oss).
    """

    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    qk_norm: Literal["none", "head", "full"] = "none"
    sliding_window: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    sinks: bool = False
    rope_theta: float = 10_000.0
    rotary_dim: int | None = None
    rope_interleaved: bool = False
    rope_scaling: RopeScaling = RopeScaling()
    softmax_scale: float | None = None
    norm_eps: float = 1e-6
    latent: LatentConfig = LatentConfig()

    def validate(self, path: str) -> None:
        positive(self, path, "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", "rope_theta")
        positive(self, path, "rotary_dim", "softmax_scale")
        kv = self.num_key_value_heads
        if kv is not None and self.num_attention_heads % kv:
            raise ConfigError(
                f"{join(path, 'num_key_value_heads')}: {kv} does not divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim is not None and self.head_dim % 2:
            raise ConfigError(f"{join(path, 'head_dim')}: {self.head_dim} is odd; rotary positions need pairs")
        if self.latent.kv_lora_rank and (self.qk_norm != "none" or self.qkv_bias or self.output_bias or self.sinks):
            raise ConfigError(f"{join(path, 'latent')}: goes with no qk_norm, biases or sinks")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim > (self.head_dim or math.inf)):
            raise ConfigError(
                f"{join(path, 'rotary_dim')}: {self.rotary_dim} of head_dim={self.head_dim}; expected an even number "
                "of at most the head"
            )

    def query_size(self, hidden_size: int) -> int:
        """Width of a head's queries and keys."""
        if self.latent.kv_lora_rank:
            return self.latent.qk_nope_head_dim + self.latent.qk_rope_head_dim
        return self.head_dim or hidden_size // self.num_attention_heads


RotaryKey = tuple[int, float, RopeScaling]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """Who may see whom: positions for rotary angles and order, segments that do not see each other, validity.

    `rotary`: angles by (rotated size, theta, scaling), made before the layers are scanned.
    """

    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"] | None = None
    valid: Bool[Array, "B S"] | None = None
    rotary: dict["RotaryKey", Angles] = dataclasses.field(default_factory=dict)

    def with_rotary(self, keys: Iterable["RotaryKey"], dtype) -> "View":
        return dataclasses.replace(self, rotary={key: angles(self.positions, *key, dtype) for key in keys})


class Attention(nnx.Module):
    """Softmax attention with its own cache."""

    Config = AttentionConfig
    #: its linear layers -> how many dims of the weight are inputs
    linears = {"q": 1, "k": 1, "v": 1, "o": 2}

    def __init__(self, config: AttentionConfig, *, hidden_size: int, out_scale: float):
        D, N = hidden_size, config.num_attention_heads
        M = config.num_key_value_heads or N
        H = config.query_size(D)
        self.config, self.dims = config, (D, N, M, H)
        self.q = param((D, N, H), ("embed", "heads", "head_dim"), fan_in(D))
        self.k = param((D, M, H), ("embed", "kv_heads", "head_dim"), fan_in(D))
        self.v = param((D, M, H), ("embed", "kv_heads", "head_dim"), fan_in(D))
        self.o = param((N, H, D), ("heads", "head_dim", "embed"), fan_in(N * H, out_scale))
        # flat, so that the optimizer sees vectors
        if config.qkv_bias:
            self.q_bias = param((N * H,), ("heads",), Constant(0.0))
            self.k_bias = param((M * H,), ("kv_heads",), Constant(0.0))
            self.v_bias = param((M * H,), ("kv_heads",), Constant(0.0))
        if config.output_bias:
            self.o_bias = param((D,), ("embed",), Constant(0.0))
        if config.sinks:
            self.sinks = param((N,), ("heads",), Constant(0.0))
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = RMSNorm(N * H if full else H, config.norm_eps, axis="qk_norm")
            self.k_norm = RMSNorm(M * H if full else H, config.norm_eps, axis="qk_norm")

    @property
    def rotary_key(self) -> RotaryKey:
        return self.config.rotary_dim or self.dims[3], self.config.rope_theta, self.config.rope_scaling

    def init_cache(self, batch: int, max_seq: int, dtype) -> dict:
        """Keys, values and who they are, for `max_seq` tokens."""
        D, N, M, H = self.dims
        return {
            "k": jnp.zeros((batch, M, max_seq, H), dtype),
            "v": jnp.zeros((batch, M, max_seq, H), dtype),
            "positions": jnp.zeros((batch, max_seq), jnp.int32),
            "valid": jnp.zeros((batch, max_seq), bool),
        }

    def __call__(
        self, x_BSD: Float[Array, "B S D"], view: View, cache: dict | None = None, at=None, tap: Tap = untouched
    ):
        """Returns (output, cache). With a cache, the S new tokens are written at index `at` and see all before them.
        `tap`: what is made of every linear layer's output.
        """
        return self.observed(x_BSD, view, cache, at, tap)[:2]

    def observed(
        self, x_BSD: Float[Array, "B S D"], view: View, cache: dict | None = None, at=None, tap: Tap = untouched
    ):
        """Returns (output, cache, AttentionView): as a call, with what was compared and mixed."""
        D, N, M, H = self.dims
        B, S, _ = x_BSD.shape
        q_BNSH, k_BMSH, v_BMSH = self._project(x_BSD, tap)
        sin_cos = view.rotary[self.rotary_key]
        q_BNSH, k_BMSH = (rotate(x, sin_cos, self.config.rope_interleaved) for x in (q_BNSH, k_BMSH))
        if cache is not None:
            cache = self._append(cache, k_BMSH, v_BMSH, view, at)
            k_BMSH, v_BMSH = cache["k"], cache["v"]
        sight = self._sight(view, cache, at)
        out_BNSH = self._mix(q_BNSH, k_BMSH, v_BMSH, sight)
        o = self.o[...].astype(x_BSD.dtype).reshape(N * H, D)
        mixed = out_BNSH.transpose(0, 2, 1, 3).reshape(B * S, N * H)
        out = tap("o", mixed, mixed @ o, o).reshape(B, S, D)
        seen = self._seen(q_BNSH, k_BMSH, v_BMSH, out, sight)
        if self.config.output_bias:
            out = out + self.o_bias[...].astype(out.dtype)
        return out, cache, seen

    def _sight(self, view: View, cache, at) -> Sight:
        if cache is None:
            return Sight(view.positions, view.positions, view.segment_ids, view.valid)
        return Sight(view.positions, cache["positions"], None, cache["valid"], at)

    def _mix(self, q, k, v, sight: Sight):
        window, scale = self.config.sliding_window, self.config.softmax_scale
        if sight.first is None:
            return attend_causally(q, k, v, self._sinks(), sight, window, scale)
        return attend(q, k, v, sight.mask(slice(None), slice(None), window), scale, self._sinks())

    def _seen(self, q, k, v, out, sight: Sight) -> AttentionView:
        scale = q.shape[-1] ** -0.5 if self.config.softmax_scale is None else self.config.softmax_scale
        return AttentionView(q * scale, k, v, self.o[...], out, sight, self.config.sliding_window)

    def _project(self, x_BSD, tap: Tap):
        """q, k, v by one dot on flat tokens: a CPU core reaches its peak only on wide matrices."""
        D, N, M, H = self.dims
        B, S, _ = x_BSD.shape
        weights = [p[...].reshape(D, -1).astype(x_BSD.dtype) for p in (self.q, self.k, self.v)]
        x_TD = x_BSD.reshape(B * S, D)
        qkv = x_TD @ jnp.concatenate(weights, axis=1)
        if tap is not untouched:
            parts = jnp.split(qkv, [N * H, (N + M) * H], axis=-1)
            qkv = jnp.concatenate([tap(n, x_TD, y, w) for n, y, w in zip("qkv", parts, weights)], axis=-1)
        if self.config.qkv_bias:
            qkv = qkv + jnp.concatenate([b[...] for b in (self.q_bias, self.k_bias, self.v_bias)]).astype(qkv.dtype)
        q, k, v = jnp.split(qkv, [N * H, (N + M) * H], axis=-1)
        if self.config.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.reshape(B, S, -1, H).transpose(0, 2, 1, 3) for t in (q, k, v))
        if self.config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _sinks(self):
        return self.sinks[...] if self.config.sinks else None

    def _append(self, cache, k_BMSH, v_BMSH, view, at):
        valid = jnp.ones(view.positions.shape, bool) if view.valid is None else view.valid
        new = {"k": (k_BMSH, 2), "v": (v_BMSH, 2), "positions": (view.positions, 1), "valid": (valid, 1)}
        write = lambda old, value, axis: jax.lax.dynamic_update_slice_in_dim(old, value.astype(old.dtype), at, axis)
        return {name: write(old, *new[name]) for name, old in cache.items()}

    def flops_per_token(self, context: float) -> float:
        """Projections, scores and mixing over `context` visible keys on average. Forward; multiply-adds count two."""
        D, N, M, H = self.dims
        if self.config.sliding_window is not None:
            context = min(context, self.config.sliding_window)
        return 2 * D * H * (2 * N + 2 * M) + 4 * N * H * context
