"""DeepSeekMoE-16B (DeepseekForCausalLM, remote code), token by token in float64 from config.json and the tensors alone.

    p = softmax(W_g x);  y = sum of p_e E_e(x) over the K best e, p as it is  +  E_shared(x)        (arXiv 2401.06066)

Layers before `first_k_dense_replace` have one wide network instead. Nothing of moe_zoo is used.
"""

import numpy as np

TINY = {
    "deepseek": dict(
        architectures=["DeepseekForCausalLM"], model_type="deepseek", vocab_size=96, hidden_size=32,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40,
        moe_intermediate_size=12, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3,
        first_k_dense_replace=1, moe_layer_freq=1, norm_topk_prob=False, scoring_func="softmax", aux_loss_alpha=0.001,
        seq_aux=True, attention_bias=True, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=500.0, rope_scaling=None,
        max_position_embeddings=128, tie_word_embeddings=False,
    ),
}  # fmt: skip


def shapes(c: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, as published: linear weights [out, in]."""
    D, V = c["hidden_size"], c["vocab_size"]
    heads, kv = D, D // c["num_attention_heads"] * c["num_key_value_heads"]
    found = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}

    def network(prefix: str, F: int) -> None:
        for name, shape in (("gate_proj", (F, D)), ("up_proj", (F, D)), ("down_proj", (D, F))):
            found[f"{prefix}.{name}.weight"] = shape

    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        found |= {f"{at}.{name}.weight": (D,) for name in ("input_layernorm", "post_attention_layernorm")}
        for name, out, in_ in (("q", heads, D), ("k", kv, D), ("v", kv, D), ("o", D, heads)):
            found |= {f"{at}.self_attn.{name}_proj.weight": (out, in_), f"{at}.self_attn.{name}_proj.bias": (out,)}
        if not c["attention_bias"]:
            found = {name: shape for name, shape in found.items() if not name.endswith("bias")}
        if layer < c["first_k_dense_replace"] or layer % c["moe_layer_freq"]:
            network(f"{at}.mlp", c["intermediate_size"])
            continue
        found[f"{at}.mlp.gate.weight"] = (c["n_routed_experts"], D)
        for e in range(c["n_routed_experts"]):
            network(f"{at}.mlp.experts.{e}", c["moe_intermediate_size"])
        network(f"{at}.mlp.shared_experts", c["n_shared_experts"] * c["moe_intermediate_size"])
    return found


def logits(c: dict, w: dict[str, np.ndarray], ids: np.ndarray) -> tuple[np.ndarray, list[list[list[int]]]]:
    """([S, V] of one text, per routed layer and token the chosen experts)."""
    x, chosen = w["model.embed_tokens.weight"][ids], []
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        x = x + _attention(w, f"{at}.self_attn", c, _norm(c, x, w[f"{at}.input_layernorm.weight"]))
        h = _norm(c, x, w[f"{at}.post_attention_layernorm.weight"])
        if f"{at}.mlp.gate.weight" not in w:
            x = x + _network(w, f"{at}.mlp", h)
            continue
        routes = [_route(w, f"{at}.mlp.gate", c, token) for token in h]
        chosen.append([sorted(route) for route in routes])
        rows = [
            sum(gate * _network(w, f"{at}.mlp.experts.{e}", token) for e, gate in route.items())
            for token, route in zip(h, routes)
        ]
        x = x + np.array(rows) + _network(w, f"{at}.mlp.shared_experts", h)
    return _norm(c, x, w["model.norm.weight"]) @ w["lm_head.weight"].T, chosen


def _norm(c, x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + c["rms_norm_eps"]) * scale


def _linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def _network(w, prefix, x):
    gate, up = _linear(w, f"{prefix}.gate_proj", x), _linear(w, f"{prefix}.up_proj", x)
    return _linear(w, f"{prefix}.down_proj", gate / (1 + np.exp(-gate)) * up)


def _route(w, prefix, c, x) -> dict[int, float]:
    """{expert: gate} of one token."""
    z, K = w[f"{prefix}.weight"] @ x, c["num_experts_per_tok"]
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    best = np.argsort(-p)[:K]
    total = p[best].sum() if c["norm_topk_prob"] and K > 1 else 1.0
    return {int(e): p[e] / total for e in best}


def _attention(w, prefix, c, x):
    N, M = c["num_attention_heads"], c["num_key_value_heads"]
    q, k, v = (
        _linear(w, f"{prefix}.{name}_proj", x).reshape(len(x), heads, -1) for name, heads in zip("qkv", (N, M, M))
    )
    q, k, H = _turn(q, c), _turn(k, c), q.shape[-1]
    out = np.zeros_like(q)
    for s in range(len(x)):
        for n in range(N):
            m = n // (N // M)
            scores = k[: s + 1, m] @ q[s, n] / np.sqrt(H)
            weights = np.exp(scores - scores.max())
            out[s, n] = weights / weights.sum() @ v[: s + 1, m]
    return _linear(w, f"{prefix}.o_proj", out.reshape(len(x), -1))


def _turn(x, c):
    """Dims (i, i + H/2) by the angle of pair i."""
    h = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * c["rope_theta"] ** (-np.arange(h) / h)
    a, b = x[..., :h], x[..., h:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)
