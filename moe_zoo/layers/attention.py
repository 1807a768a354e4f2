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
from moe_zoo.layers.norm import NORMS, rms
from moe_zoo.layers.rope import Angles, RopeScaling, angles, rotate
from moe_zoo.layers.tap import Tap, untouched


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (`layers/latent_attention.py`); `kv_lora_rank` 0: none. `q_lora_rank` 0: queries
    straight from the hidden state. Queries and the latent are multiplied by `q_scale`, `kv_scale` (LongCat-Flash).
    """

    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    q_scale: float = 1.0
    kv_scale: float = 1.0

    def validate(self, path: str) -> None:
        positive(self, path, "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_scale", "kv_scale")
        positive(self, path, "kv_lora_rank", "q_lora_rank", zero=True)
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"{join(path, 'qk_rope_head_dim')}: {self.qk_rope_head_dim} is odd; rotation needs pairs")


@dataclasses.dataclass(frozen=True)
class HeadExpertsConfig:
    """Mixture of attention heads (`layers/head_experts.py`); `num_experts` 0: none."""

    num_experts: int = 0
    num_experts_per_tok: int = 2

    def validate(self, path: str) -> None:
        positive(self, path, "num_experts_per_tok")
        positive(self, path, "num_experts", zero=True)
        if self.num_experts and self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"{join(path, 'num_experts_per_tok')}: {self.num_experts_per_tok} of num_experts={self.num_experts}; "
                f"at most {self.num_experts}"
            )


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """`head_dim` None: hidden_size / num_attention_heads. `qk_norm`: RMSNorm of q and k, per "head" (Qwen3) or over
    the "full" width before the split into heads (OLMoE), or per head without weights ("unscaled", Llama 4);
    `qk_norm_after_rope`: once rotated; `qk_norm_kind`: RMSNorm with weights about 0 (Qwen3-Next). `sliding_window` w: a
    query sees itself and the w - 1 tokens before it. `chunk_size` c: only tokens of its own run of c positions.
    `qkv_bias`, `output_bias`: biases of the projections. `clip_qkv` c: queries, keys and values are cut to [-c, c]
    (DBRX). `output_gate`: what heads return is multiplied by sigmoid(x W_g) (AFMoE, Qwen3-Next). `rotary_dim`: how much
    of a head is rotated, None for all, 0 for nothing (no positions); `rope_interleaved`: in pairs (2i, 2i + 1).
    `softmax_scale` multiplies the scores, None: 1/sqrt(head_dim); `temperature_scale` s: besides, those of the query at
    position p by 1 + s log(1 + floor((p + 1) / temperature_floor)) (arXiv 2501.19399, as in Llama 4). `sinks`: one
    learned logit per head beside the keys, which takes weight and adds nothing (gpt-oss).
    """

    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    qk_norm: Literal["none", "head", "full", "unscaled"] = "none"
    qk_norm_after_rope: bool = False
    sliding_window: int | None = None
    qk_norm_kind: Literal["rms", "rms_plus_one"] = "rms"
    chunk_size: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    clip_qkv: float | None = None
    output_gate: bool = False
    sinks: bool = False
    rope_theta: float = 10_000.0
    rotary_dim: int | None = None
    rope_interleaved: bool = False
    rope_scaling: RopeScaling = RopeScaling()
    softmax_scale: float | None = None
    temperature_scale: float = 0.0
    temperature_floor: int = 8192
    norm_eps: float = 1e-6
    latent: LatentConfig = LatentConfig()
    experts: HeadExpertsConfig = HeadExpertsConfig()

    def validate(self, path: str) -> None:
        positive(self, path, "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", "rope_theta")
        positive(self, path, "chunk_size", "clip_qkv", "softmax_scale", "temperature_floor")
        positive(self, path, "rotary_dim", "temperature_scale", zero=True)
        kv = self.num_key_value_heads
        if kv is not None and self.num_attention_heads % kv:
            raise ConfigError(
                f"{join(path, 'num_key_value_heads')}: {kv} does not divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim is not None and self.head_dim % 2:
            raise ConfigError(f"{join(path, 'head_dim')}: {self.head_dim} is odd; rotary positions need pairs")
        given = [name for name in _PLAIN_ONLY if getattr(self, name) != _OFF[name]]
        for name, there in (("latent", self.latent.kv_lora_rank), ("experts", self.experts.num_experts)):
            if there and given:
                raise ConfigError(f"{join(path, name)}: goes without {', '.join(given)}")
        self._validate_experts(path)
        if self.qk_norm_after_rope and self.qk_norm in ("none", "full"):
            raise ConfigError(f"{join(path, 'qk_norm_after_rope')}: needs qk_norm per head, got {self.qk_norm!r}")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim > (self.head_dim or math.inf)):
            raise ConfigError(
                f"{join(path, 'rotary_dim')}: {self.rotary_dim} of head_dim={self.head_dim}; expected an even number "
                "of at most the head"
            )

    def _validate_experts(self, path: str) -> None:
        K = self.experts.num_experts_per_tok
        if not self.experts.num_experts:
            return
        if self.latent.kv_lora_rank:
            raise ConfigError(f"{join(path, 'experts')}: goes without latent attention")
        if self.num_attention_heads != K * (self.num_key_value_heads or 0):
            raise ConfigError(
                f"{join(path, 'num_attention_heads')}: {self.num_attention_heads}; {K} experts per token with "
                f"num_key_value_heads={self.num_key_value_heads} are another number"
            )

    def query_size(self, hidden_size: int) -> int:
        """Width of a head's queries and keys."""
        if self.latent.kv_lora_rank:
            return self.latent.qk_nope_head_dim + self.latent.qk_rope_head_dim
        return self.head_dim or hidden_size // self.num_attention_heads


#: what only plain attention has a place for
_PLAIN_ONLY = ("qk_norm", "qkv_bias", "output_bias", "clip_qkv", "output_gate", "sinks")
_OFF = {field.name: field.default for field in dataclasses.fields(AttentionConfig)}

RotaryKey = tuple[int, float, RopeScaling]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """Who may see whom: positions for rotary angles and order, segments that do not see each other, validity. `layer`:
    the number of the one that looks. `train`: whether it is trained, for mixers that differ then.

    `rotary`: angles by (rotated size, theta, scaling), made before the layers are scanned.
    """

    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"] | None = None
    valid: Bool[Array, "B S"] | None = None
    rotary: dict["RotaryKey", Angles] = dataclasses.field(default_factory=dict)
    layer: Int[Array, ""] | None = None
    train: bool = dataclasses.field(default=False, metadata={"static": True})

    def with_rotary(self, keys: Iterable["RotaryKey | None"], dtype) -> "View":
        """With the angles of all `keys`; None is a mixer without."""
        made = {key: angles(self.positions, *key, dtype) for key in keys if key is not None}
        return dataclasses.replace(self, rotary=made)


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
        if config.output_gate:
            self.gate = param((D, N, H), ("embed", "heads", "head_dim"), fan_in(D))
        if config.sinks:
            self.sinks = param((N,), ("heads",), Constant(0.0))
        if config.qk_norm in ("head", "full"):
            full = config.qk_norm == "full"
            norm = NORMS[config.qk_norm_kind]
            self.q_norm = norm(N * H if full else H, config.norm_eps, axis="qk_norm")
            self.k_norm = norm(M * H if full else H, config.norm_eps, axis="qk_norm")

    @property
    def rotary_key(self) -> RotaryKey | None:
        """Which angles it turns by; None for none."""
        c = self.config
        return None if c.rotary_dim == 0 else (c.rotary_dim or self.dims[3], c.rope_theta, c.rope_scaling)

    @property
    def shares(self) -> dict[str, float]:
        """Of variables that a token uses only in part, which part."""
        return {}

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
        """Returns (output, cache). With a cache, the S new tokens are written at index `at`, or of every row at its
        own [B], and see all before them. `tap`: what is made of every linear layer's output.
        """
        return self.observed(x_BSD, view, cache, at, tap)[:2]

    def observed(
        self, x_BSD: Float[Array, "B S D"], view: View, cache: dict | None = None, at=None, tap: Tap = untouched
    ):
        """Returns (output, cache, AttentionView): as a call, with what was compared and mixed."""
        D, N, M, H = self.dims
        B, S, _ = x_BSD.shape
        q_BNSH, k_BMSH, v_BMSH = self._project(x_BSD, tap)
        q_BNSH, k_BMSH = self._position(q_BNSH, k_BMSH, view)
        if cache is not None:
            cache = self._append(cache, k_BMSH, v_BMSH, view, at)
            k_BMSH, v_BMSH = cache["k"], cache["v"]
        sight = self._sight(view, cache, at)
        out_BNSH = self._mix(q_BNSH, k_BMSH, v_BMSH, sight)
        o = self.o[...].astype(x_BSD.dtype).reshape(N * H, D)
        mixed = out_BNSH.transpose(0, 2, 1, 3).reshape(B * S, N * H)
        if self.config.output_gate:
            gate = x_BSD.reshape(B * S, D) @ self.gate[...].astype(x_BSD.dtype).reshape(D, N * H)
            mixed = mixed * jax.nn.sigmoid(gate)
        out = tap("o", mixed, mixed @ o, o).reshape(B, S, D)
        seen = self._seen(q_BNSH, k_BMSH, v_BMSH, out, sight)
        if self.config.output_bias:
            out = out + self.o_bias[...].astype(out.dtype)
        return out, cache, seen

    def remember(self, x_BSD: Float[Array, "B S D"], view: View, cache: dict, at) -> dict:
        """The cache with the keys and values of tokens that ask nothing; without experts, latents or adapters."""
        D, N, M, H = self.dims
        x_TD = x_BSD.reshape(-1, D)
        kv = x_TD @ jnp.concatenate([p[...].reshape(D, M * H).astype(x_BSD.dtype) for p in (self.k, self.v)], axis=1)
        if self.config.qkv_bias:
            kv = kv + jnp.concatenate([b[...] for b in (self.k_bias, self.v_bias)]).astype(kv.dtype)
        if self.config.clip_qkv is not None:
            kv = jnp.clip(kv, -self.config.clip_qkv, self.config.clip_qkv)
        k, v = jnp.split(kv, 2, axis=-1)
        if self.config.qk_norm == "full":
            k = self.k_norm(k)
        k, v = (t.reshape(*x_BSD.shape[:2], M, H).transpose(0, 2, 1, 3) for t in (k, v))
        return self._append(cache, self._position(k, k, view)[1], v, view, at)

    def _sight(self, view: View, cache, at) -> Sight:
        chunk = self.config.chunk_size
        if cache is None:
            return Sight(view.positions, view.positions, view.segment_ids, view.valid, chunk=chunk)
        return Sight(view.positions, cache["positions"], None, cache["valid"], at, chunk)

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
        if self.config.clip_qkv is not None:
            qkv = jnp.clip(qkv, -self.config.clip_qkv, self.config.clip_qkv)
        q, k, v = jnp.split(qkv, [N * H, (N + M) * H], axis=-1)
        if self.config.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        return (t.reshape(B, S, -1, H).transpose(0, 2, 1, 3) for t in (q, k, v))

    def _position(self, q, k, view: View):
        """q, k normed per head and rotated, in the model's order; queries at the temperature of their position."""
        c = self.config
        if not c.qk_norm_after_rope:
            q, k = self._norm_heads(q, k)
        if self.rotary_key is not None:
            sin_cos = view.rotary[self.rotary_key]
            q, k = (rotate(x, sin_cos, c.rope_interleaved) for x in (q, k))
        if c.qk_norm_after_rope:
            q, k = self._norm_heads(q, k)
        if c.temperature_scale:
            steps = jnp.floor((view.positions.astype(jnp.float32) + 1) / c.temperature_floor)
            q = (q * (1 + c.temperature_scale * jnp.log1p(steps))[:, None, :, None]).astype(q.dtype)
        return q, k

    def _norm_heads(self, q, k):
        if self.config.qk_norm == "head":
            return self.q_norm(q), self.k_norm(k)
        if self.config.qk_norm == "unscaled":
            return (rms(x, self.config.norm_eps).astype(x.dtype) for x in (q, k))
        return q, k

    def _sinks(self):
        return self.sinks[...] if self.config.sinks else None

    def _append(self, cache, k_BMSH, v_BMSH, view, at):
        valid = jnp.ones(view.positions.shape, bool) if view.valid is None else view.valid
        new = {"k": (k_BMSH, 2), "v": (v_BMSH, 2), "positions": (view.positions, 1), "valid": (valid, 1)}
        return {name: write(old, new[name][0], at, new[name][1]) for name, old in cache.items()}

    def flops_per_token(self, context: float) -> float:
        """Projections, scores and mixing over `context` visible keys on average. Forward; multiply-adds count two."""
        D, N, M, H = self.dims
        gate = 2 * D * N * H if self.config.output_gate else 0
        return 2 * D * H * (2 * N + 2 * M) + gate + 4 * N * H * self._visible(context)

    def flops_to_remember(self) -> float:
        """Forward FLOPs of the keys and values of one token."""
        D, _, M, H = self.dims
        return 4 * D * M * H

    def _visible(self, context: float) -> float:
        """Keys that a query sees on average, of `context` at or before it."""
        c = self.config
        context = context if c.sliding_window is None else min(context, c.sliding_window)
        return context if c.chunk_size is None else min(context, (c.chunk_size + 1) / 2)


def write(old, new, at, axis: int):
    """`new` [B, ...] into the cache `old`, from place `at` of that axis (1 or 2) on: the same one in every row, or one
    for each [B], where nothing is written that lies beyond the end.
    """
    new = new.astype(old.dtype)
    if not jnp.ndim(at):
        return jax.lax.dynamic_update_slice_in_dim(old, new, at, axis)
    rows, places = jnp.arange(old.shape[0])[:, None], at[:, None] + jnp.arange(new.shape[axis])
    if axis == 1:
        return old.at[rows, places].set(new, mode="drop")
    return old.at[rows, :, places].set(jnp.swapaxes(new, 1, 2), mode="drop")
