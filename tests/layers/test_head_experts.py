"""A mixture of attention heads against a loop over tokens, experts and heads, and its cache against the whole."""

import dataclasses

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from naive import normal, tiny_config, tiny_model

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.layers.attention import AttentionConfig, View
from moe_zoo.layers.head_experts import HeadExperts
from moe_zoo.models.counting import count_parameters

E, K, M, H, D = 5, 2, 3, 4, 8
CONFIG = AttentionConfig(
    num_attention_heads=K * M, num_key_value_heads=M, head_dim=H, rope_theta=50.0, sliding_window=4
)
EXPERTS = dict(num_experts=E, num_experts_per_tok=K)


@jax.jit
def run(made, x, places, cache=None, at=None):
    view = View(jnp.broadcast_to(places, x.shape[:2])).with_rotary({made.rotary_key}, x.dtype)
    return made(x, view, cache, at)


def test_every_token_asks_with_its_experts_heads_over_keys_that_all_share():
    config = dataclasses.replace(CONFIG, experts=dataclasses.replace(CONFIG.experts, **EXPERTS))
    config.validate("attention")
    made = P.materialize(HeadExperts(config, hidden_size=D, out_scale=1.0), 0)
    made = P.replace(made, {n: normal(i, *a.shape, scale=0.5) for i, (n, a) in enumerate(P.arrays(made).items())})
    x = normal(9, 2, 6, D)
    whole = run(made, x, jnp.arange(6))[0]
    w, X = {n: np.asarray(a, np.float64) for n, a in P.arrays(made).items()}, np.asarray(x, np.float64)
    used = set()
    for b in range(2):
        k, v = (np.einsum("sd,dmh->smh", X[b], w[n]) for n in "kv")
        for i in range(6):
            logits = X[b, i] @ w["router"]
            experts = np.argsort(-logits)[:K]
            out = w["o_bias"].copy()
            for gate, e in zip(naive.softmax(logits[experts]), experts):
                used.add(int(e))
                for m in range(M):
                    q = naive.rope(X[b, i] @ w["q"][e, :, m], i, 50.0)
                    seen = range(max(0, i - 3), i + 1)
                    scores = np.array([q @ naive.rope(k[j, m], j, 50.0) / H**0.5 for j in seen])
                    out += gate * (naive.softmax(scores) @ v[list(seen), m]) @ w["o"][e, m]
            np.testing.assert_allclose(whole[b, i], out, rtol=2e-3, atol=1e-4)
    assert len(used) == E
    cache, pieces = made.init_cache(2, 8, jnp.float32), []
    assert cache["k"].shape == (2, M, 8, H)
    for part in (slice(0, 4), slice(4, 6)):
        out, cache = run(made, x[:, part], jnp.arange(6)[part], cache, jnp.int32(part.start))
        pieces.append(out)
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, rtol=1e-4, atol=1e-5)


def test_what_is_active_and_what_does_not_fit():
    attention = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=4, experts=EXPERTS)
    made = tiny_model(layers="2*dense", attention=attention)
    counts, mixer = count_parameters(made), made.segments[0].blocks[0].mixer
    unused = (mixer.q[...].size + mixer.o[...].size) * (1 - K / E)
    assert counts["total"] - counts["active"] == pytest.approx(unused, abs=2)
    for wrong, words in (
        ({"num_attention_heads": 6}, "num_attention_heads: 6; 2 experts per token"),
        ({"output_gate": True}, "experts: goes without output_gate"),
        ({"experts": {"num_experts": 1}}, "num_experts_per_tok: 2 of num_experts=1"),
    ):
        with pytest.raises(ConfigError, match=words):
            tiny_config(layers="1*dense", attention=attention | wrong)
    with pytest.raises(ConfigError, match="looks at attention"):
        tiny_model(layers="1*moe", router={"name": "attention_aware"}, losses={}, attention=attention)
