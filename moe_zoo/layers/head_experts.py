"""Mixture of attention heads (MoA, arXiv 2210.05144), as in JetMoE (arXiv 2404.07413): queries and outputs by experts.

    experts = TopK(x W_r), gates = softmax of their logits;  keys and values of M heads for all experts
    y = sum_k gate_k (attend(x Q_{e_k}, keys, values) O_{e_k}) + b

The cache holds M heads, whatever E and K are. The router is trained by what comes out alone: no balance loss sees it.
B batch, S query length, T = B * S tokens, D model, E experts, K of them per token, R = T * K rows, M key-value heads,
H head size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import pallas_kernels as ops
from moe_zoo.core.param import Constant, Normal, fan_in, param
from moe_zoo.layers.attention import Attention, AttentionConfig, View
from moe_zoo.layers.tap import Tap, untouched


class HeadExperts(Attention):
    """Softmax attention whose query and output projections are experts: K of E, each with as many heads as the keys."""

    Config = AttentionConfig

    def __init__(self, config: AttentionConfig, *, hidden_size: int, out_scale: float):
        D, E = hidden_size, config.experts.num_experts
        K, H = config.experts.num_experts_per_tok, config.query_size(hidden_size)
        M = config.num_attention_heads // K
        self.config, self.dims, self.choices = config, (D, K * M, M, H), (E, K)
        self.router = param((D, E), ("embed", "expert_logits"), Normal(0.02))
        self.q = param((E, D, M, H), (None, "embed", "kv_heads", "head_dim"), fan_in(D))
        self.k = param((D, M, H), ("embed", "kv_heads", "head_dim"), fan_in(D))
        self.v = param((D, M, H), ("embed", "kv_heads", "head_dim"), fan_in(D))
        self.o = param((E, M, H, D), (None, "kv_heads", "head_dim", "embed"), fan_in(M * H, out_scale))
        self.o_bias = param((D,), ("embed",), Constant(0.0))

    @property
    def shares(self) -> dict[str, float]:
        """Which part of a variable one token uses."""
        E, K = self.choices
        return {"q": K / E, "o": K / E}

    linears = {}  # none that adapters could act beside

    def observed(
        self, x_BSD: Float[Array, "B S D"], view: View, cache: dict | None = None, at=None, tap: Tap = untouched
    ):
        """Returns (output, cache, None): there is no single output projection to show."""
        (D, N, M, H), (E, K) = self.dims, self.choices
        B, S, _ = x_BSD.shape
        x_TD = x_BSD.reshape(B * S, D)
        wide = jnp.promote_types(x_TD.dtype, jnp.float32)
        logits_TE = x_TD.astype(wide) @ self.router[...].astype(wide)
        top_TK, experts_TK = jax.lax.top_k(logits_TE, K)
        sizes_E, row_TK = ops.expert_rows(experts_TK.astype(jnp.int32), E)
        choice_R = jnp.zeros(B * S * K, jnp.int32).at[row_TK.reshape(-1)].set(jnp.arange(B * S * K, dtype=jnp.int32))
        flat = lambda w, *shape: w[...].astype(x_TD.dtype).reshape(shape)
        q_RN = ops.grouped_matmul(ops.gather_rows(x_TD, choice_R // K, row_TK), flat(self.q, E, D, M * H), sizes_E)
        q_N = ops.gather_rows(q_RN, row_TK.reshape(-1), choice_R[:, None])
        # head m * K + k: the K that share keys side by side
        q_BNSH = q_N.reshape(B, S, K, M, H).transpose(0, 3, 2, 1, 4).reshape(B, N, S, H)
        k_BMSH, v_BMSH = (jnp.einsum("bsd,dmh->bmsh", x_BSD, flat(w, D, M, H)) for w in (self.k, self.v))
        q_BNSH, k_BMSH = self._position(q_BNSH, k_BMSH, view)
        if cache is not None:
            cache = self._append(cache, k_BMSH, v_BMSH, view, at)
            k_BMSH, v_BMSH = cache["k"], cache["v"]
        out = self._mix(q_BNSH, k_BMSH, v_BMSH, self._sight(view, cache, at))
        out = out.reshape(B, M, K, S, H).transpose(0, 3, 2, 1, 4).reshape(B * S * K, M * H)
        y_RD = ops.grouped_matmul(
            ops.gather_rows(out, choice_R, row_TK.reshape(-1, 1)), flat(self.o, E, M * H, D), sizes_E
        )
        y_TD = ops.combine_rows(y_RD, row_TK, jax.nn.softmax(top_TK), choice_R)
        return y_TD.reshape(B, S, D) + self.o_bias[...].astype(y_TD.dtype), cache, None

    def flops_per_token(self, context: float) -> float:
        """Projections, scores and mixing over `context` visible keys on average. Forward; multiply-adds count two."""
        (D, N, M, H), (E, _) = self.dims, self.choices
        return 2 * D * E + 2 * D * H * (2 * N + 2 * M) + 4 * N * H * self._visible(context)
