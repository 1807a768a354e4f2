"""The layer of LongCat-Flash against its equations, and zero experts against a loop over tokens."""

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from naive import normal, tiny_config, tiny_model

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.layers.attention import View
from moe_zoo.models.counting import count_parameters

E, Z, K = 4, 3, 3
ROUTER = dict(
    name="top_k", num_experts_per_tok=K, num_zero_experts=Z, norm_topk_prob=False, routed_scaling_factor=2.0,
    correction_bias=True, init_std=1.0,
)  # fmt: skip
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 6)))


def model():
    made = tiny_model(layers="1*shortcut", num_experts=E, router=ROUTER, losses={})
    scale = lambda name: 0.02 if "correction" in name else 0.4
    draw = {n: normal(i, *a.shape, scale=scale(n)) for i, (n, a) in enumerate(P.arrays(made).items())}
    return P.replace(made, draw)


def routed(ffn, u_TD):
    """(output, experts per token) by a loop."""
    w = {name: np.asarray(a, np.float64) for name, a in P.arrays(ffn).items()}
    out, true = np.zeros_like(u_TD), []
    for t, u in enumerate(u_TD):
        probs = naive.softmax(np.append(u @ w["router.kernel"], u @ w["router.zero_kernel"]))
        best = np.argsort(-(probs + np.append(w["router.correction"], w["router.zero_correction"])))[:K]
        for e in best:
            one = naive.ffn(u, *(w[f"experts.w_{x}"][e] for x in ("gate", "up", "down"))) if e < E else u
            out[t] += 2.0 * probs[e] * one
        true.append(sum(e < E for e in best))
    return out, true


def test_experts_run_beside_two_dense_blocks_and_some_return_the_token():
    made = model()
    block = jax.tree.map(lambda a: a[0], made.segments[0].blocks[0])
    view = View(jnp.broadcast_to(jnp.arange(6), (2, 6))).with_rotary({block.mixer.rotary_key}, jnp.float32)
    x = made.embed(IDS, jnp.float32)
    x = x + block.mixer(block.mixer_norm(x), view)[0]
    u = block.ffn_norm(x)
    extra, true = routed(block.ffn, np.asarray(u, np.float64).reshape(12, -1))
    x = x + block.dense(u)
    x = x + block.second.mixer(block.second.mixer_norm(x), view)[0]
    x = x + block.second.ffn(block.second.ffn_norm(x)) + extra.reshape(x.shape)
    logits, aux, _ = made(IDS)
    np.testing.assert_allclose(logits, made.head(made.norm(x)), rtol=1e-3, atol=1e-4)
    assert len(set(true)) > 1  # some tokens have fewer experts
    assert aux.stats["segments.0.blocks.0"]["experts_per_token"].value() == pytest.approx([np.mean(true)])
    cache, pieces = made.init_cache(2, 8), []
    for part in (IDS[:, :4], IDS[:, 4:]):
        rows, _, cache = made(part, cache=cache)
        pieces.append(rows)
    np.testing.assert_allclose(np.concatenate(pieces, 1), logits, rtol=1e-4, atol=1e-5)


def test_what_does_nothing_is_not_active():
    made = model()
    counts, bank = count_parameters(made), made.segments[0].blocks[0].ffn.experts
    size = sum(a.size for a in P.arrays(bank).values())
    assert counts["total"] - counts["active"] == pytest.approx(size * (1 - K / (E + Z)), abs=3)
    with pytest.raises(ConfigError, match="num_zero_experts"):
        tiny_config(layers="1*moe", num_experts=4, router=ROUTER | {"n_group": 2})
    with pytest.raises(ConfigError, match="num_experts_per_tok"):
        tiny_config(layers="1*moe", num_experts=4, router=ROUTER | {"num_experts_per_tok": 8})
