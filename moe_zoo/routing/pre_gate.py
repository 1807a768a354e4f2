"""Pre-gating (Read-ME, Cai et al., arXiv 2410.19123): one small router reads token ids and decides for all layers.

    h_0 = table[ids];  n times: h += Attention(RMSNorm(h)), causal;  h += W_2 silu(W_1 RMSNorm(h))
    G = RMSNorm(h) W + b  [T, E];  e_t = argmax G_t, in every layer

It runs once per forward, before the first layer, and knows nothing of the model: routes can be had ahead of time, for
batching and prefetching, and no other weight changes them. `reads="token"` is the paper's ablation, without attention.

In the paper the experts are parts of a trained dense model and the gate is 1, through which nothing learns: the router
is trained on how well each expert's channels answer in each layer (the loss `route_targets`). From scratch there are no
such scores; with `gate="prob"`, softmax(G)_e as in Switch, the router learns from the task. That is ours.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.param import Constant, fan_in, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.layers.attention import Attention, AttentionConfig, View
from moe_zoo.layers.embedding import Embedding
from moe_zoo.layers.mlp import MLP, FeedForwardConfig
from moe_zoo.layers.norm import RMSNorm
from moe_zoo.routing.router import CostBound, Dims, Router, Shared, gather_gates
from moe_zoo.routing.top_k import select

_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class PreGateConfig:
    """`size` of the router's stream and hidden layers, `num_layers` n. `attn_normalizer`: what scores are divided by;
    None: the root of the head's size (the authors' script: 1). `gate`: "one" (paper) or "prob".
    """

    reads: Literal["context", "token"] = "context"
    gate: Literal["one", "prob"] = "one"
    size: int = 64
    num_layers: int = 2
    num_attention_heads: int = 2
    attn_normalizer: float | None = None

    def validate(self, path: str) -> None:
        positive(self, path, "size", "num_layers", "num_attention_heads", "attn_normalizer")
        if self.size % (2 * self.num_attention_heads):
            raise ConfigError(
                f"{join(path, 'size')}: {self.size} over num_attention_heads={self.num_attention_heads} gives no even "
                "head size"
            )

    def attention(self) -> AttentionConfig:
        return AttentionConfig(
            num_attention_heads=self.num_attention_heads,
            qkv_bias=True,
            output_bias=True,
            softmax_scale=None if self.attn_normalizer is None else 1 / self.attn_normalizer,
        )


class PreGateBlock(nnx.Module):
    """One pre-norm block; without attention if only the token is read."""

    def __init__(self, config: PreGateConfig):
        size, out_scale = config.size, (2 * config.num_layers) ** -0.5
        if config.reads == "context":
            self.mixer_norm = RMSNorm(size, _EPS)
            self.mixer = Attention(config.attention(), hidden_size=size, out_scale=out_scale)
        self.ffn_norm = RMSNorm(size, _EPS)
        ffn = FeedForwardConfig(gated=False, bias=True)
        self.ffn = MLP(ffn, hidden_size=size, intermediate_size=size, out_scale=out_scale)

    def __call__(self, h_BSD: Float[Array, "B S D"], view: View, cache, at):
        """Returns (h, cache)."""
        if hasattr(self, "mixer"):
            y_BSD, cache = self.mixer(self.mixer_norm(h_BSD), view, cache, at)
            h_BSD = h_BSD + y_BSD
        return h_BSD + self.ffn(self.ffn_norm(h_BSD)), cache


class PreGateNetwork(Shared):
    """The router of all layers: logits over experts from token ids."""

    def __init__(self, config: PreGateConfig, dims: Dims):
        self.config = config
        self.embed = Embedding(dims.vocab_size, config.size, std=config.size**-0.5)
        self.blocks = nnx.List(PreGateBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.size, _EPS)
        self.kernel = param((config.size, dims.num_experts), ("embed", "expert_logits"), fan_in(config.size))
        self.bias = param((dims.num_experts,), ("expert_logits",), Constant(0.0))

    @property
    def dtype(self):
        """Of its computations: float32 or wider."""
        return jnp.promote_types(self.embed.table.get_value().dtype, jnp.float32)

    def before_layers(self, ctx: RoutingContext, cache: dict | None) -> tuple[Float[Array, "T E"], dict | None]:
        """(logits, cache), in float32 or wider."""
        B, S = ctx.batch, ctx.seq
        rows = lambda x_T: None if x_T is None else x_T.reshape(B, S)
        positions_BS = jnp.broadcast_to(jnp.arange(S), (B, S)) if ctx.positions is None else rows(ctx.positions)
        h_BSD = self.embed(rows(ctx.token_ids), self.dtype)
        view = View(positions_BS, rows(ctx.segment_ids), rows(ctx.valid))
        if self.config.reads == "context":
            view = view.with_rotary({self.blocks[0].mixer.rotary_key}, h_BSD.dtype)
        caches = [None] * len(self.blocks) if cache is None else cache["blocks"]
        at, new = None if cache is None else cache["at"], []
        for block, one in zip(self.blocks, caches, strict=True):
            h_BSD, one = block(h_BSD, view, one, at)
            new.append(one)
        logits_TE = self.norm(h_BSD).reshape(B * S, -1) @ self.kernel[...] + self.bias[...]
        return logits_TE, None if cache is None else {"at": at + S, "blocks": new}

    def init_cache(self, batch: int, max_seq: int) -> dict | None:
        if self.config.reads == "token":
            return None
        blocks = [block.mixer.init_cache(batch, max_seq, self.dtype) for block in self.blocks]
        return {"at": jnp.zeros((), jnp.int32), "blocks": blocks}

    def flops_per_token(self, context: float) -> float:
        flops = 2 * self.kernel.get_value().size
        for block in self.blocks:
            flops += block.ffn.flops_per_token()
            flops += block.mixer.flops_per_token(context) if hasattr(block, "mixer") else 0
        return flops


class PreGate(Router):
    """One small causal transformer over token ids decides, ahead of the model, one expert per token for all layers."""

    Config = PreGateConfig
    requires = ("token_ids",)
    cost = CostBound(25, 6, "a transformer over the ids: measured for one layer, it runs once for all of them")

    def __init__(self, config: PreGateConfig, dims: Dims):
        self.config, self.num_experts = config, dims.num_experts

    @classmethod
    def make_shared(cls, config: PreGateConfig, dims: Dims) -> PreGateNetwork:
        return PreGateNetwork(config, dims)

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        logits_TE = ctx.shared
        probs_TE = jax.nn.softmax(logits_TE)
        experts_T1 = select(logits_TE, 1, ctx.inputs.get("router_bias"))
        gates_T1 = gather_gates(probs_TE, experts_T1)
        if self.config.gate == "one":
            gates_T1 = jnp.ones_like(gates_T1)
        return Routing(TokenChoice(experts_T1, gates_T1, self.num_experts), logits_TE, probs_TE)

    def max_active(self) -> int:
        return 1

    def flops_per_token(self, hidden_size: int) -> float:
        """None of a layer's: the network is counted once, with what the layers share."""
        return 0
