"""OpenMoE (OpenMoeForCausalLM, code of ColossalAI), token by token in float64 from config.json and the tensors alone.

    network(x) = ((x A) * silu(x B) * (x U)) W           A beside B in one tensor
    layer:     x += attention(norm x);  x += network(norm x)
    each n-th: x += attention(norm x);  x += sum of p_e network_e(norm x) over the two best e;  x += extra(norm x)

p = softmax of all experts, as it is; scores of attention are q k, not divided (arXiv 2402.01739). With `places`, an
expert has so many for the whole text, given to all first choices in order, then to all second ones; the rest is lost.
Nothing of moe_zoo is used.
"""

import numpy as np

TINY = {
    "openmoe": dict(
        architectures=["OpenMoeForCausalLM"], model_type="llama", vocab_size=96, hidden_size=32, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, head_dim=16, intermediate_size=20, num_experts=8, topk=2,
        router_topk=2, moe_layer_interval=2, hidden_act="swiglu", gated=True, mlp_gated=True, dropout_rate=0.0,
        layer_norm_epsilon=1e-6, rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=128, min_capacity=4,
        router_min_capacity=4, router_capacity_factor_train=1.25, router_capacity_factor_eval=2.0, drop_tks=True,
        router_aux_loss_factor=0.01, router_z_loss_factor=0.0001, pretraining_tp=1, tie_word_embeddings=False,
    ),
}  # fmt: skip


def shapes(c: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, as published: linear weights [out, in], those of experts [E, in, out]."""
    D, F, V, E = (c[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "num_experts"))
    heads = c["num_attention_heads"] * c["head_dim"]
    found = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}

    def network(prefix: str) -> None:
        for name, shape in (("gate_proj", (2 * F, D)), ("up_proj", (F, D)), ("down_proj", (D, F))):
            found[f"{prefix}.{name}.weight"] = shape

    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        found |= {f"{at}.{name}.weight": (D,) for name in ("input_layernorm", "post_attention_layernorm")}
        found |= {f"{at}.self_attn.{x}_proj.weight": (D, heads) if x == "o" else (heads, D) for x in "qkvo"}
        if (layer + 1) % c["moe_layer_interval"]:
            network(f"{at}.mlp")
            continue
        found[f"{at}.mlp.gate_weight"] = (E, D)
        found |= {f"{at}.mlp.experts.{x}": shape for x, shape in (("wi_gate", (E, D, 2 * F)), ("wi_up", (E, D, F)))}
        found |= {f"{at}.mlp.experts.wo": (E, F, D), f"{at}.pre_extra_mlp_layernorm.weight": (D,)}
        network(f"{at}.extra_mlp")
    return found


def places(c: dict, S: int) -> int:
    """Of one expert, for a text of S tokens, while nothing is trained."""
    C = int(c["router_topk"] * c["router_capacity_factor_eval"] * S / c["num_experts"])
    return max(C + C % 2, c["router_min_capacity"])


def logits(
    c: dict, w: dict[str, np.ndarray], ids: np.ndarray, places: int | None = None
) -> tuple[np.ndarray, list[list[list[int]]]]:
    """([S, V] of one text, per routed layer and token the experts that it reaches)."""
    x, chosen = w["model.embed_tokens.weight"][ids], []
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        x = x + _attention(w, f"{at}.self_attn", c, _norm(c, x, w[f"{at}.input_layernorm.weight"]))
        h = _norm(c, x, w[f"{at}.post_attention_layernorm.weight"])
        if f"{at}.mlp.gate_weight" not in w:
            x = x + _dense(w, f"{at}.mlp", h)
            continue
        routes = _routes(w[f"{at}.mlp.gate_weight"], c["router_topk"], h, places)
        chosen.append([sorted(route) for route in routes])
        tensors = [w[f"{at}.mlp.experts.{name}"] for name in ("wi_gate", "wi_up", "wo")]
        for s, route in enumerate(routes):
            x[s] += sum(gate * _network(h[s], *(t[e] for t in tensors)) for e, gate in route.items())
        x = x + _dense(w, f"{at}.extra_mlp", _norm(c, x, w[f"{at}.pre_extra_mlp_layernorm.weight"]))
    return _norm(c, x, w["model.norm.weight"]) @ w["lm_head.weight"].T, chosen


def _norm(c, x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + c["rms_norm_eps"]) * scale


def _network(x, wide, up, down):
    """`wide` [D, 2F]: what is linear, then what goes through silu."""
    a, b = np.split(x @ wide, 2, axis=-1)
    return (a * b / (1 + np.exp(-b)) * (x @ up)) @ down


def _dense(w, prefix, x):
    return _network(x, *(w[f"{prefix}.{name}_proj.weight"].T for name in ("gate", "up", "down")))


def _routes(kernel, K, h, places) -> list[dict[int, float]]:
    """Per token {expert: gate} of the experts that it reaches."""
    z = h @ kernel.T
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    order, asked, found = np.argsort(-p, axis=1), np.zeros(len(kernel), int), [{} for _ in h]
    for k in range(K):
        for s, e in enumerate(order[:, k]):
            if places is None or asked[e] < places:
                found[s][int(e)] = p[s, e]
            asked[e] += 1
    return found


def _attention(w, prefix, c, x):
    q, k, v = (
        (x @ w[f"{prefix}.{name}_proj.weight"].T).reshape(len(x), c["num_attention_heads"], c["head_dim"])
        for name in "qkv"
    )
    q, k, out = _turn(q), _turn(k), np.zeros_like(v)
    for s in range(len(x)):
        for n in range(c["num_attention_heads"]):
            scores = k[: s + 1, n] @ q[s, n]
            weights = np.exp(scores - scores.max())
            out[s, n] = weights / weights.sum() @ v[: s + 1, n]
    return out.reshape(len(x), -1) @ w[f"{prefix}.o_proj.weight"].T


def _turn(x):
    """Dims (i, i + H/2) by the angle of pair i, to the base 10,000 whatever config.json says."""
    h = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * 10_000.0 ** (-np.arange(h) / h)
    a, b = x[..., :h], x[..., h:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)
