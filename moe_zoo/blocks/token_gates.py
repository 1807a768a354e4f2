"""A node of DynTokenRoutingViT: a block that each token of a grid may pass by, and a way down to the coarser grid.

    A_t = G_t B(F)_t + (1 - G_t) F_t             depth gate, of the token
    down_u = G'_u P(F)_u                         scale gate, of the coarse token u, decided by the mean of its four

B is attention and a feed-forward part with their residuals; its queries, and its keys too but for `kv_all`, are the
tokens whose gate is open. G = 0 is the token itself, to the bit. P puts four tokens side by side and projects them.

Two forms of a gate of v = MLP(token):  "tanh": max(0, tanh v), closed and without gradient where v <= 0;
"straight_through": 1 where v > 0, with the gradient of sigmoid v. Both begin open, by the bias of v. And three controls
without parameters: "open", "random" (each token with the same probability), "static" (whole nodes).

B batch, S tokens of a grid of Y x X, U = S / 4 coarse tokens, D model, C tokens that are computed.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from moe_zoo.blocks.block import Block
from moe_zoo.blocks.selective import take
from moe_zoo.core.param import Constant, Normal, fan_in, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.layers.grid import GridView
from moe_zoo.layers.mlp import MLP, FeedForwardConfig
from moe_zoo.layers.norm import LayerNorm, rms
from moe_zoo.mixers.bi_level import GridMixer
from moe_zoo.routing.router import at_least_f32

OPEN = 1e-4  # a gate that is not above is closed


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """`kind`: see above. `hidden_size` of v's network; `bias` of v at first. `depth_share` and `scale_share` are the
    probabilities of random gates; static ones are open in the first `static_stages` stages.
    """

    kind: Literal["tanh", "straight_through", "open", "random", "static"] = "straight_through"
    hidden_size: int = 8
    bias: float = 1.5
    depth_share: float = 0.5
    scale_share: float = 0.5
    static_stages: int = 2

    def validate(self, path: str) -> None:
        positive(self, path, "hidden_size")
        positive(self, path, "static_stages", zero=True)
        for name in ("depth_share", "scale_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{join(path, name)}: {getattr(self, name)}; expected a share in [0, 1]")

    @property
    def learned(self) -> bool:
        return self.kind in ("tanh", "straight_through")


class Gate(nnx.Module):
    """One number per token: how much of a path it takes; float32 or wider."""

    def __init__(self, config: GateConfig, hidden_size: int, share: float):
        self.config, self.share, D, F = config, share, hidden_size, config.hidden_size
        self.dims = D, F
        if config.learned:
            self.w_in = param((D, F), ("embed", None), fan_in(D))
            self.b_in = param((F,), (None,), Constant(0.0))
            self.w_out = param((F, 1), (None, None), Normal(0.5 / F**0.5))
            self.b_out = param((1,), (None,), Constant(config.bias))

    def __call__(self, x_BSD: Float[Array, "B S D"], stage, key) -> Float[Array, "B S"]:
        """`stage`: which of the row's nodes it is in."""
        kind, shape = self.config.kind, x_BSD.shape[:2]
        if kind == "open":
            return jnp.ones(shape, jnp.float32)
        if kind == "static":
            return jnp.broadcast_to(stage < self.config.static_stages, shape).astype(jnp.float32)
        if kind == "random":
            return (jax.random.uniform(key, shape) < self.share).astype(jnp.float32)
        hidden = jax.nn.gelu(rms(x_BSD, 1e-6) @ self.w_in[...] + self.b_in[...])
        return opened((hidden @ self.w_out[...] + self.b_out[...])[..., 0], kind)

    @property
    def flops_per_token(self) -> int:
        """Forward; multiply-adds count two."""
        D, F = self.dims
        return 2 * F * (D + 1) if self.config.learned else 0


def opened(v: Float[Array, "..."], kind: str) -> Float[Array, "..."]:
    """The gate of v."""
    if kind == "tanh":
        return jnp.maximum(jnp.tanh(v), 0)
    soft = jax.nn.sigmoid(v)
    return jax.lax.stop_gradient((v > 0) - soft) + soft


class TokenAttention(GridMixer):
    """Attention of some tokens to the live ones of others, by heads."""

    def __init__(self, *, hidden_size: int, num_heads: int, out_scale: float):
        super().__init__(hidden_size=hidden_size, num_heads=num_heads, out_scale=out_scale, qkv_bias=True)

    def __call__(
        self, x_BCD: Float[Array, "B C D"], seen_BLD: Float[Array, "B L D"], live_BL: Bool[Array, "B L"]
    ) -> Float[Array, "B C D"]:
        q, k, v = self.project("q", x_BCD), self.project("k", seen_BLD), self.project("v", seen_BLD)
        scores = at_least_f32(jnp.einsum("bcnh,blnh->bncl", q * self.dims[2] ** -0.5, k))
        # a finite number: where nothing is live nobody asks, and no gradient may be NaN
        weights = jax.nn.softmax(jnp.where(live_BL[:, None, None], scores, -1e30), axis=-1).astype(v.dtype)
        return self.out(jnp.einsum("bncl,blnh->bcnh", weights, v))


class Node(Block):
    """One scale at one stage. `coarse`: the width of the next scale, None where there is none."""

    def __init__(
        self,
        gate: GateConfig,
        *,
        hidden_size: int,
        coarse: int | None,
        num_heads: int,
        mlp_ratio: int,
        kv_all: bool,
        eps: float,
        out_scale: float,
    ):
        D, mlp = hidden_size, FeedForwardConfig(activation="gelu", gated=False, bias=True)
        super().__init__(
            mixer=TokenAttention(hidden_size=D, num_heads=num_heads, out_scale=out_scale),
            ffn=MLP(mlp, hidden_size=D, intermediate_size=mlp_ratio * D, out_scale=out_scale),
            mixer_norm=LayerNorm(D, eps),
            ffn_norm=LayerNorm(D, eps),
        )
        self.kv_all, self.sizes = kv_all, (D, coarse)
        self.depth = Gate(gate, D, gate.depth_share)
        if coarse is not None:
            self.scale = Gate(gate, D, gate.scale_share)
            self.down_norm = LayerNorm(4 * D, eps)
            self.w_down = param((4 * D, coarse), ("embed", None), fan_in(4 * D))

    def through(self, x_BSD, gate_BS, capacity: int | None = None) -> Float[Array, "B S D"]:
        """A. With a `capacity` the C tokens of largest gates are computed, and the others pass by."""
        if capacity is None:
            return _blend(x_BSD, self._block(x_BSD, x_BSD, gate_BS > OPEN), gate_BS)
        _, at_BC = jax.lax.top_k(gate_BS, capacity)
        some_BCD, gate_BC = take(x_BSD, at_BC), take(gate_BS, at_BC)
        gate_BC = jnp.where(gate_BC > OPEN, gate_BC, 0)
        y_BCD = _blend(some_BCD, self._block(some_BCD, x_BSD, gate_BC > OPEN), gate_BC)
        return x_BSD.at[jnp.arange(len(x_BSD))[:, None], at_BC].set(y_BCD, unique_indices=True)

    def _block(self, x_BCD, all_BSD, live_BC):
        """B of the tokens x, which see one another if they are live, or all."""
        h_BCD = self.mixer_norm(x_BCD)
        seen = (self.mixer_norm(all_BSD), jnp.ones(all_BSD.shape[:2], bool)) if self.kv_all else (h_BCD, live_BC)
        x_BCD = x_BCD + self.mixer(h_BCD, *seen)
        return x_BCD + self.ffn(self.ffn_norm(x_BCD))

    def down(self, fours_BUF: Float[Array, "B U 4*D"], gate_BU, capacity: int | None = None) -> Float[Array, "B U D2"]:
        """What goes to the coarser scale, zeros through closed gates. `capacity` as in `through`."""
        project = lambda fours: self.down_norm(fours) @ self.w_down[...].astype(fours.dtype)
        if capacity is None:
            return project(fours_BUF) * gate_BU[..., None].astype(fours_BUF.dtype)
        _, at_BC = jax.lax.top_k(gate_BU, capacity)
        y_BCD = project(take(fours_BUF, at_BC)) * take(gate_BU, at_BC)[..., None].astype(fours_BUF.dtype)
        empty = jnp.zeros((*gate_BU.shape, self.sizes[1]), y_BCD.dtype)
        return empty.at[jnp.arange(len(empty))[:, None], at_BC].set(y_BCD, unique_indices=True)

    def block_flops(self, open_tokens, tokens: int):
        """Forward FLOPs of B when that many of `tokens` are open (a number, or an array of them)."""
        D = self.sizes[0]
        keys = tokens if self.kv_all else open_tokens
        return open_tokens * (4 * D * D + 4 * D * keys + self.ffn.flops_per_token()) + keys * 4 * D * D

    def down_flops(self, open_tokens):
        """Forward FLOPs of P for that many coarse tokens."""
        D, coarse = self.sizes
        return open_tokens * 8 * D * coarse if coarse else 0 * open_tokens

    def gate_flops(self, tokens: int) -> float:
        """Forward FLOPs of the gates, which are asked of all tokens."""
        return tokens * self.depth.flops_per_token + (tokens // 4 * self.scale.flops_per_token if self.sizes[1] else 0)


def fours(x_BSD: Float[Array, "B S D"], view: GridView) -> Float[Array, "B U 4*D"]:
    """The four tokens that become a coarse one, side by side."""
    B, S, D = x_BSD.shape
    x = x_BSD.reshape(B, view.height // 2, 2, view.width // 2, 2, D)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, S // 4, 4 * D)


def _blend(x, y, gate):
    """(1 - gate) x + gate y."""
    g = gate[..., None]
    return (g * at_least_f32(y) + (1 - g) * at_least_f32(x)).astype(x.dtype)
