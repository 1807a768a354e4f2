"""Ling (BailingMoeForCausalLM, BailingMoeV2ForCausalLM), which transformers has no class for: a tiny checkpoint under
the published names, and what it computes, token by token in float64, from config.json and the tensors alone.

After the published equations (arXiv 2503.05139 and the model cards of version 2); nothing of moe_zoo is used but the
writer of safetensors.
"""

import json

import numpy as np

from moe_zoo.checkpoints.hf import safetensors

COMMON = dict(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=40, moe_intermediate_size=12, num_experts=8, num_experts_per_tok=3, num_shared_experts=2,
    rms_norm_eps=1e-6, rope_theta=500.0, max_position_embeddings=128, hidden_act="silu", tie_word_embeddings=False,
)  # fmt: skip
TINY = {
    "bailing_moe": dict(
        COMMON, architectures=["BailingMoeForCausalLM"], model_type="bailing_moe", norm_topk_prob=True, use_bias=True,
        use_qkv_bias=True, norm_head=False,
    ),
    "bailing_moe_v2": dict(
        COMMON, architectures=["BailingMoeV2ForCausalLM"], model_type="bailing_moe_v2", first_k_dense_replace=1,
        n_group=4, topk_group=2, routed_scaling_factor=2.5, partial_rotary_factor=0.5, use_qk_norm=True,
    ),
}  # fmt: skip


def tensors(c: dict) -> dict[str, np.ndarray]:
    """Random weights under the published names: routers decide, norms and biases act."""
    rng = np.random.default_rng(0)
    draw = lambda *shape, scale: (scale * rng.standard_normal(shape)).astype(np.float32)
    D, N, M, H = (c[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
    V2 = c["model_type"] == "bailing_moe_v2"
    found = {name: draw(c["vocab_size"], D, scale=0.3) for name in ("model.word_embeddings.weight", "lm_head.weight")}
    found["model.norm.weight"] = 1 + draw(D, scale=0.3)

    def network(prefix: str, F: int) -> None:
        for name, shape in (("gate_proj", (F, D)), ("up_proj", (F, D)), ("down_proj", (D, F))):
            found[f"{prefix}.{name}.weight"] = draw(*shape, scale=0.2)

    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}.{name}.weight"] = 1 + draw(D, scale=0.3)
        found[f"{at}.attention.query_key_value.weight"] = draw((N + 2 * M) * H, D, scale=0.2)
        found[f"{at}.attention.dense.weight"] = draw(D, N * H, scale=0.2)
        if c.get("use_qkv_bias"):
            found[f"{at}.attention.query_key_value.bias"] = draw((N + 2 * M) * H, scale=0.3)
        if c.get("use_bias"):
            found[f"{at}.attention.dense.bias"] = draw(D, scale=0.3)
        if V2:
            for name in ("query_layernorm", "key_layernorm"):
                found[f"{at}.attention.{name}.weight"] = 1 + draw(H, scale=0.3)
        if layer < c.get("first_k_dense_replace", 0):
            network(f"{at}.mlp", c["intermediate_size"])
            continue
        found[f"{at}.mlp.gate.weight"] = draw(c["num_experts"], D, scale=1.0)
        if V2:
            found[f"{at}.mlp.gate.expert_bias"] = draw(c["num_experts"], scale=0.2)
        for e in range(c["num_experts"]):
            network(f"{at}.mlp.experts.{e}", c["moe_intermediate_size"])
        network(f"{at}.mlp.shared_experts", c["num_shared_experts"] * c["moe_intermediate_size"])
    return found


def save(name: str, folder) -> None:
    """A directory as it would be published."""
    (folder / "config.json").write_text(json.dumps(TINY[name]))
    found = tensors(TINY[name])
    listed = [(path, array.dtype, array.shape) for path, array in sorted(found.items())]
    safetensors.write(folder / "model.safetensors", listed, found.get)


def logits(name: str, ids: np.ndarray) -> tuple[np.ndarray, list[list[list[int]]]]:
    """([S, V] of one text, per routed layer and token the chosen experts)."""
    c = TINY[name]
    w = {path: array.astype(np.float64) for path, array in tensors(c).items()}
    x, chosen = w["model.word_embeddings.weight"][ids], []
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        x = x + _attention(w, f"{at}.attention", c, _norm(x, w[f"{at}.input_layernorm.weight"]))
        h = _norm(x, w[f"{at}.post_attention_layernorm.weight"])
        if f"{at}.mlp.gate.weight" not in w:
            x = x + _network(w, f"{at}.mlp", h)
            continue
        routes = [_route(w, f"{at}.mlp.gate", c, token) for token in h]
        chosen.append([sorted(route) for route in routes])
        rows = zip(h, routes)
        routed = [sum(g * _network(w, f"{at}.mlp.experts.{e}", t) for e, g in route.items()) for t, route in rows]
        x = x + np.array(routed) + _network(w, f"{at}.mlp.shared_experts", h)
    return _norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T, chosen


def _norm(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def _network(w, prefix, x):
    gate, up = (x @ w[f"{prefix}.{name}_proj.weight"].T for name in ("gate", "up"))
    return (gate / (1 + np.exp(-gate)) * up) @ w[f"{prefix}.down_proj.weight"].T


def _attention(w, prefix, c, x):
    N, M, H = (c[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    rows = x @ w[f"{prefix}.query_key_value.weight"].T + w.get(f"{prefix}.query_key_value.bias", 0)
    heads = rows.reshape(len(x), N + 2 * M, H)
    q, k, v = heads[:, :N], heads[:, N : N + M], heads[:, N + M :]
    if f"{prefix}.query_layernorm.weight" in w:
        q, k = _norm(q, w[f"{prefix}.query_layernorm.weight"]), _norm(k, w[f"{prefix}.key_layernorm.weight"])
    q, k = _turn(q, c), _turn(k, c)
    out = np.zeros((len(x), N, H))
    for s in range(len(x)):
        for n in range(N):
            m = n // (N // M)
            scores = k[: s + 1, m] @ q[s, n] / np.sqrt(H)
            weights = np.exp(scores - scores.max())
            out[s, n] = weights / weights.sum() @ v[: s + 1, m]
    return out.reshape(len(x), N * H) @ w[f"{prefix}.dense.weight"].T + w.get(f"{prefix}.dense.bias", 0)


def _turn(x, c):
    """Dims (i, i + h) of the first 2h by the angle of pair i."""
    h = int(c["head_dim"] * c.get("partial_rotary_factor", 1.0)) // 2
    angle = np.arange(len(x))[:, None, None] * c["rope_theta"] ** (-np.arange(h) / h)
    a, b = x[..., :h], x[..., h : 2 * h]
    turned = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    return np.concatenate([*turned, x[..., 2 * h :]], -1)


def _route(w, prefix, c, x) -> dict[int, float]:
    """{expert: gate} of one token."""
    z, K = w[f"{prefix}.weight"] @ x, c["num_experts_per_tok"]
    if c["model_type"] == "bailing_moe":
        scores = choice = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        scale = 1.0
    else:
        scores = 1 / (1 + np.exp(-z))
        choice, scale = scores + w[f"{prefix}.expert_bias"], c["routed_scaling_factor"]
        size = len(z) // c["n_group"]
        best = [np.sort(choice[g * size : (g + 1) * size])[-2:].sum() for g in range(c["n_group"])]
        kept = np.argsort(best)[-c["topk_group"] :]
        choice = np.array([choice[e] if e // size in kept else -np.inf for e in range(len(z))])
    experts = np.argsort(choice)[-K:]
    return {int(e): scale * scores[e] / scores[experts].sum() for e in experts}
