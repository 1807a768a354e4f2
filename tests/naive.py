"""Reference loops in plain numpy, float64, one token at a time; and the small model that tests share.

B batch, S sequence, T tokens, D model, F expert hidden, E experts, K experts per token, C capacity, N query heads,
M key-value heads, H head size.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_zoo.core import param as P
from moe_zoo.core.context import AttentionView, RoutingContext
from moe_zoo.core.schema import build
from moe_zoo.core.sight import Sight
from moe_zoo.models import Decoder, ModelConfig


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def silu(z):
    return z * sigmoid(z)


def best(values, K):
    """Ids of the K largest, best first, ties to the lower id. (A stable sort of the negated values.)"""
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:K]


def top_k(
    logits_TE, K, *, score="softmax", norm=True, scale=1.0, bias=None, n_group=1, topk_group=1, group_score="top2_sum"
):
    """(experts [T, K], gates [T, K]) token by token, from the formulas of the papers."""
    T, E = logits_TE.shape
    experts, gates = np.zeros((T, K), int), np.zeros((T, K))
    for t in range(T):
        z = np.asarray(logits_TE[t], np.float64)
        s = sigmoid(z) if score == "sigmoid" else softmax(z)
        choice = s + (0 if bias is None else np.asarray(bias, np.float64))
        allowed = list(range(E))
        if n_group > 1:
            size = E // n_group
            members = [list(range(g * size, (g + 1) * size)) for g in range(n_group)]
            ranked = [sorted((choice[e] for e in m), reverse=True) for m in members]
            group = [r[0] if group_score == "max" else sum(r[:2]) for r in ranked]
            allowed = [e for g in best(group, topk_group) for e in members[g]]
        chosen = sorted(allowed, key=lambda e: (-choice[e], e))[:K]
        if score == "softmax_of_top_k":
            g = softmax(z[chosen])
        else:
            g = s[chosen] / s[chosen].sum() if norm else s[chosen]
        experts[t], gates[t] = chosen, g * scale
    return experts, gates


def ffn(x_D, gate_DF, up_DF, down_FD):
    hidden = silu(x_D @ gate_DF) * (x_D @ up_DF) if gate_DF is not None else silu(x_D @ up_DF)
    return hidden @ down_FD


def moe(x_TD, experts_TK, gates_TK, weights, gate_on="output", kept_TK=None):
    """sum_k gate * FFN_e(x) (or FFN_e(gate * x)), over the live and kept choices. weights: (gate or None, up, down)."""
    gate, up, down = (None if w is None else np.asarray(w, np.float64) for w in weights)
    x = np.asarray(x_TD, np.float64)
    out, E = np.zeros_like(x), up.shape[0]
    for t in range(x.shape[0]):
        for k in range(experts_TK.shape[1]):
            e, g = int(experts_TK[t, k]), float(gates_TK[t, k])
            if e == E or (kept_TK is not None and not kept_TK[t, k]):
                continue
            w = (None if gate is None else gate[e], up[e], down[e])
            out[t] += g * ffn(x[t], *w) if gate_on == "output" else ffn(g * x[t], *w)
    return out


def within_capacity(experts_TK, E, C, groups=1):
    """Which choices find a place: all first choices in token order, then all second choices, ..."""
    T, K = experts_TK.shape
    kept = np.zeros((T, K), bool)
    for tokens in np.arange(T).reshape(groups, -1):
        taken = [0] * E
        for k in range(K):
            for t in tokens:
                e = int(experts_TK[t, k])
                if e < E:
                    kept[t, k] = taken[e] < C
                    taken[e] += 1
    return kept


def load_balance(probs_TE, experts_TK, valid_T=None):
    T, E = probs_TE.shape
    valid = np.ones(T, bool) if valid_T is None else valid_T
    f, mean, pairs = np.zeros(E), np.zeros(E), 0
    for t in range(T):
        if not valid[t]:
            continue
        mean += probs_TE[t] / valid.sum()
        for e in experts_TK[t]:
            f[e] += 1
            pairs += 1
    return E * sum(f[e] / pairs * mean[e] for e in range(E))


def z_loss(logits_TE, valid_T=None):
    rows = [z for t, z in enumerate(np.asarray(logits_TE, np.float64)) if valid_T is None or valid_T[t]]
    return sum(np.log(np.exp(z).sum()) ** 2 for z in rows) / len(rows)


def rms_norm(x, scale, eps):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def layer_norm(x, scale, bias, eps):
    x = np.asarray(x, np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


def rope(x_H, position, theta):
    """Rotates pair (i, i + H/2) by position * theta^(-2i/H)."""
    H = x_H.shape[-1]
    out = np.zeros(H)
    for i in range(H // 2):
        angle = position * theta ** (-2 * i / H)
        a, b = x_H[i], x_H[i + H // 2]
        out[i], out[i + H // 2] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return out


def attention(
    x_BSD, q_DNH, k_DMH, v_DMH, o_NHD, sees, positions, theta, qk_norm="none", q_scale=None, k_scale=None, eps=1e-6
):
    """Query by query, key by key. `sees(b, i, j)`: may query i of row b look at key j?"""
    x, q_w, k_w, v_w, o_w = (np.asarray(a, np.float64) for a in (x_BSD, q_DNH, k_DMH, v_DMH, o_NHD))
    B, S, _ = x.shape
    N, M, H = q_w.shape[1], k_w.shape[1], q_w.shape[2]
    out = np.zeros_like(x)

    def heads(token, w, scale):
        y = np.einsum("d,dnh->nh", token, w)
        if qk_norm == "full":
            y = rms_norm(y.reshape(-1), scale, eps).reshape(y.shape)
        return rms_norm(y, scale, eps) if qk_norm == "head" else y

    for b in range(B):
        turn = lambda y, s, b=b: np.stack([rope(h, int(positions[b, s]), theta) for h in y])
        q = [turn(heads(x[b, s], q_w, q_scale), s) for s in range(S)]
        k = [turn(heads(x[b, s], k_w, k_scale), s) for s in range(S)]
        v = [np.einsum("d,dmh->mh", x[b, s], v_w) for s in range(S)]
        for i in range(S):
            keys = [j for j in range(S) if sees(b, i, j)]
            if not keys:
                continue
            for n in range(N):
                m = n // (N // M)
                weights = softmax(np.array([q[i][n] @ k[j][m] / np.sqrt(H) for j in keys]))
                out[b, i] += sum(w * v[j][m] for w, j in zip(weights, keys)) @ o_w[n]
    return out


TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "layers": "2*moe",
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "attention": {"num_attention_heads": 2},
    "router": {"name": "top_k", "num_experts_per_tok": 2, "init_std": 1.0},
}


def tiny_config(**changes) -> ModelConfig:
    return build(ModelConfig, {**TINY, **changes}, "model")


def tiny_model(seed=0, **changes) -> Decoder:
    """A decoder with weights whose router takes sides (init_std 1)."""
    return P.materialize(Decoder(tiny_config(**changes)), seed)


def jitted(model, function):
    """`function(model, *args)` compiled; returns a callable of the arguments, with `state=` to use other weights."""
    graphdef, own = nnx.split(model)
    compiled = jax.jit(lambda state, *args: function(nnx.merge(graphdef, state), *args))
    return lambda *args, state=own: compiled(state, *args)


def context(T, *, batch=1, **fields) -> RoutingContext:
    return RoutingContext(batch=batch, seq=T // batch, **fields)


def attention_view(batch, seq, D, N=2, valid_T=None) -> AttentionView:
    """Random heads of width D / N for at most 32 tokens; a shorter sequence has the beginning of a longer one's."""
    q, k, v = (normal(60 + i, batch, N, 32, D // N)[:, :, :seq] for i in range(3))
    places = jnp.broadcast_to(jnp.arange(seq), (batch, seq))
    sight = Sight(places, places, None, None if valid_T is None else jnp.asarray(valid_T).reshape(batch, seq))
    return AttentionView(q, k, v, normal(63, N, D // N, D), normal(64, batch, 32, D)[:, :seq], sight)


def normal(seed, *shape, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, jnp.float32)
