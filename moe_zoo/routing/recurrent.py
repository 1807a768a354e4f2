"""RMoE (Qiu et al., arXiv 2408.06793): a router that remembers, through depth, what earlier layers' routers saw.

    u = x A_i;  h_i = GRU(u, h_{i-1}), h_0 = 0;  P = softmax(h_i G_i);  top-k of P

A_i [D, p] and G_i [p, E] belong to the layer; the GRU is one for all layers. The state runs over layers, never over
time: a decoded token rebuilds its own from zero, so nothing is cached. Gradients flow back through all layers: that is
the point. `recurrence`: "full"; "none" passes h_0 to every layer (the paper's NP); "detached" cuts the gradient (its
worst ablation). Biases and separate input and state matrices follow the authors' code; the paper's equation 3 has one
matrix.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.param import Constant, Normal, Uniform, param
from moe_zoo.core.schema import positive
from moe_zoo.routing.router import (
    CostBound,
    Dims,
    Router,
    Shared,
    at_least_f32,
    check_experts_per_tok,
    gather_gates,
    linear_logits,
)
from moe_zoo.routing.top_k import select


@dataclasses.dataclass(frozen=True)
class RecurrentConfig:
    """`recurrent_size` p (128 in the paper; 256 and 512 are no better)."""

    num_experts_per_tok: int = 2
    recurrent_size: int = 128
    recurrence: Literal["full", "none", "detached"] = "full"
    norm_topk_prob: bool = True
    init_std: float = 0.02

    def validate(self, path: str) -> None:
        positive(self, path, "num_experts_per_tok", "recurrent_size", "init_std")

    def validate_for(self, num_experts: int, path: str) -> None:
        """What can only be checked once the bank's size is known."""
        check_experts_per_tok(self.num_experts_per_tok, num_experts, path)


class GRU(Shared):
    """The cell that all layers share. Gates in the order reset, update, candidate."""

    def __init__(self, size: int):
        bound = size**-0.5
        self.w_in = param((size, 3, size), (None, None, None), Uniform(bound))
        self.w_state = param((size, 3, size), (None, None, None), Uniform(bound))
        self.b_in = param((3, size), (None, None), Constant(0.0))
        self.b_state = param((3, size), (None, None), Constant(0.0))

    def __call__(self, u_TP: Float[Array, "T P"], h_TP: Float[Array, "T P"]) -> Float[Array, "T P"]:
        a = jnp.einsum("tp,pgq->gtq", u_TP, self.w_in[...]) + self.b_in[...][:, None]
        b = jnp.einsum("tp,pgq->gtq", h_TP, self.w_state[...]) + self.b_state[...][:, None]
        reset, update = jax.nn.sigmoid(a[0] + b[0]), jax.nn.sigmoid(a[1] + b[1])
        # the reset gate multiplies after the recurrent product and its bias
        candidate = jnp.tanh(a[2] + reset * b[2])
        return (1 - update) * candidate + update * h_TP


class Recurrent(Router):
    """RMoE: logits read from a GRU state that is carried from layer to layer."""

    Config = RecurrentConfig
    cost = CostBound(28, 4, "a GRU of p = 128 for every token: thirty times the multiplications of x W")

    def __init__(self, config: RecurrentConfig, dims: Dims):
        self.config, self.num_experts = config, dims.num_experts
        D, E, p = dims.hidden_size, dims.num_experts, config.recurrent_size
        self.project = param((D, p), ("embed", None), Normal(config.init_std))
        self.kernel = param((p, E), (None, "expert_logits"), Normal(config.init_std))

    @classmethod
    def make_shared(cls, config: RecurrentConfig, dims: Dims) -> GRU:
        return GRU(config.recurrent_size)

    def init_carry(self, num_tokens: int) -> Float[Array, "T P"]:
        return jnp.zeros((num_tokens, self.config.recurrent_size), jnp.float32)

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        c = self.config
        u_TP = linear_logits(x_TD, self.project[...])
        h_TP = ctx.carry.astype(u_TP.dtype)
        if c.recurrence == "none":
            h_TP = jnp.zeros_like(h_TP)
        elif c.recurrence == "detached":
            h_TP = jax.lax.stop_gradient(h_TP)
        h_TP = ctx.shared(u_TP, h_TP)
        logits_TE = h_TP @ at_least_f32(self.kernel[...])
        probs_TE = jax.nn.softmax(logits_TE)
        experts_TK = select(probs_TE, c.num_experts_per_tok, ctx.inputs.get("router_bias"))
        gates_TK = gather_gates(probs_TE, experts_TK)
        if c.norm_topk_prob:
            gates_TK = gates_TK / gates_TK.sum(-1, keepdims=True)
        decision = TokenChoice(experts_TK, gates_TK, self.num_experts)
        return Routing(decision, logits_TE, probs_TE, carry=h_TP.astype(ctx.carry.dtype))

    def max_active(self) -> int:
        return self.config.num_experts_per_tok

    def flops_per_token(self, hidden_size: int) -> float:
        """Projection, the six matrices of the GRU, logits."""
        p = self.config.recurrent_size
        return 2 * p * (hidden_size + 6 * p + self.num_experts)
