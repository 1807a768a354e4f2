"""A graph of tokens: both routers against loops over tokens, the paper's inequalities, who informs whom, the cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import best, context, normal, softmax, tiny_config, tiny_model

from moe_zoo.core import param as P
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.registry import ConfigError
from moe_zoo.layers.attention import Attention, AttentionConfig, LatentConfig, View
from moe_zoo.layers.latent_attention import LatentAttention
from moe_zoo.routing.router import Dims
from moe_zoo.routing.token_graph import (
    AttentionAware,
    AttentionAwareConfig,
    SimilarityAware,
    SimilarityAwareConfig,
    row_entropy,
)
from moe_zoo.routing.top_k import TopK, TopKConfig

B, S, D, E, N, H = 2, 9, 8, 5, 4, 4
X = normal(0, B * S, D)
# a row of two documents and padding behind them, and a row with padding in front
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [0, 0, 3, 3, 3, 3, 3, 3, 3]])
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0], [0, 0, 0, 1, 2, 3, 4, 5, 6]])
VALID = SEGMENTS > 0
PACKED = {name: jnp.asarray(a) for name, a in (("segments", SEGMENTS), ("positions", POSITIONS), ("valid", VALID))}


def similar(**settings) -> SimilarityAware:
    router = P.materialize(SimilarityAware(SimilarityAwareConfig(init_std=1.0, **settings), Dims(E, D)), 0)
    if settings.get("weights") == "uniform":
        return router
    return P.replace(router, {**P.arrays(router), "similarity": normal(9, D, D, scale=0.5)})


def attentive(**settings) -> AttentionAware:
    return P.materialize(AttentionAware(AttentionAwareConfig(init_std=1.0, **settings), Dims(E, D, 0, N, H)), 0)


def packed_context(**fields) -> RoutingContext:
    flat = {"segment_ids": SEGMENTS.ravel(), "positions": POSITIONS.ravel(), "valid": VALID.ravel()}
    return context(B * S, batch=B, **{name: jnp.asarray(a) for name, a in flat.items()}, **fields)


route = jax.jit(lambda router, x, ctx: router(x, ctx))


@functools.cache
def view_of(latent=False, **settings):
    """What an attention layer hands over for the packed rows."""
    settings |= {"latent": LatentConfig(6, 0, 4, 2, 3)} if latent else {"head_dim": H}
    config = AttentionConfig(num_attention_heads=N, **settings)
    made = P.materialize((LatentAttention if latent else Attention)(config, hidden_size=D, out_scale=1.0), 0)
    view = View(PACKED["positions"], PACKED["segments"], PACKED["valid"])
    show = jax.jit(lambda made, x: made.observed(x, view.with_rotary({made.rotary_key}, x.dtype), None, None)[2])
    return show(made, normal(3, B, S, D))


def sees(b, i, j, window=None):
    near = window is None or POSITIONS[b, i] - POSITIONS[b, j] < window
    return j == i or (j < i and near and VALID[b, j] and SEGMENTS[b, i] == SEGMENTS[b, j])


def entropy(p):
    return -sum(v * np.log(v) for v in p if v > 0)


def alone(router, x=X):
    logits = np.asarray(x, np.float64) @ np.asarray(router.kernel[...], np.float64)
    return np.array([softmax(z) for z in logits])


def check(router, routing, weights, norm=True):
    """`weights(b, i)` -> {j: w}; every valid token's mixture, experts and gates. Returns the rows {(b, i): w}."""
    e, K = alone(router).reshape(B, S, E), router.config.num_experts_per_tok
    probs, choice, rows, moved = np.asarray(routing.probs).reshape(B, S, E), routing.decision, {}, 0
    for b, i in zip(*np.nonzero(VALID)):
        rows[b, i] = w = weights(b, i)
        assert sum(w.values()) == pytest.approx(1)
        mixed = sum(w[j] * e[b, j] for j in w)
        np.testing.assert_allclose(probs[b, i], mixed, rtol=1e-4, atol=1e-6)
        experts, t = best(mixed, K), b * S + i
        np.testing.assert_array_equal(choice.experts[t], experts)
        np.testing.assert_allclose(
            choice.gates[t], mixed[experts] / (mixed[experts].sum() if norm else 1), rtol=1e-4, atol=1e-6
        )
        moved += experts != best(e[b, i], K)
    np.testing.assert_allclose(probs[~VALID], e[~VALID], rtol=1e-4)  # padding informs nobody and hears nobody
    assert moved > 0, "some token must choose otherwise than by itself"
    return rows


def similarity_rows(router):
    c, e = router.config, alone(router).reshape(B, S, E)
    x = np.asarray(X, np.float64).reshape(B, S, D)

    def row(b, i):
        certain = lambda j: j == i or c.informants == "all" or entropy(e[b, j]) <= entropy(e[b, i])
        keys = [j for j in range(S) if sees(b, i, j, c.window) and certain(j)]
        if c.weights == "uniform":
            return {j: 1 / len(keys) for j in keys}
        W = np.asarray(router.similarity[...], np.float64)
        w = softmax(np.array([x[b, i] @ W @ x[b, j] for j in keys]) / (c.tau or D**0.5))
        return dict(zip(keys, w))

    return row


def attention_rows(view, head, sigma):
    """(A, w) of one head: rows {j: weight}, m and the squared distances written out."""
    q, k, v, o, u = (np.asarray(a, np.float64) for a in (view.q, view.k, view.v, view.o, view.out))
    group = head // (N // k.shape[1])

    def row(b, i):
        keys = [j for j in range(S) if sees(b, i, j, view.window)]
        a = softmax(np.array([q[b, head, i] @ k[b, group, j] for j in keys]))
        far = np.array([((u[b, i] - N * v[b, group, j] @ o[head]) ** 2).sum() for j in keys])
        variance = sigma**2 * max((a * far).sum(), 1e-12)
        w = a * np.exp(-(far - far.min()) / (2 * variance))
        return dict(zip(keys, a)), dict(zip(keys, w / w.sum()))

    return row


# ----------------------------------------------------------------------------------------------------- against loops


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tau": 0.7, "num_experts_per_tok": 1, "norm_topk_prob": False},
        {"window": 3},
        {"window": 3, "weights": "uniform"},
        {"informants": "more_certain"},
    ],
    ids=lambda s: "-".join(map(str, s.values())) or "default",
)
def test_similarity_aware_equals_a_loop_in_packed_and_padded_rows(settings):
    router = similar(**settings)
    routing = route(router, X, packed_context())
    rows = check(router, routing, similarity_rows(router), settings.get("norm_topk_prob", True))
    # the entropy of a mixture is at most the mean of the entropies and that of the weights
    e, probs = alone(router).reshape(B, S, E), np.asarray(routing.probs).reshape(B, S, E)
    for (b, i), w in rows.items():
        assert entropy(probs[b, i]) <= sum(w[j] * entropy(e[b, j]) for j in w) + entropy(w.values()) + 1e-5


@pytest.mark.parametrize(
    "settings, layer",
    [({"sigma": 0.5}, {"num_key_value_heads": 2}), ({}, {"sliding_window": 3, "sinks": True}), ({}, {"latent": True})],
    ids=["grouped", "window", "latent"],
)
def test_attention_aware_equals_a_loop_in_packed_and_padded_rows(settings, layer):
    router, view = attentive(head=2, **settings), view_of(**layer)
    rows = attention_rows(view, 2, router.config.sigma)
    check(router, route(router, X, packed_context(attention=view)), lambda b, i: rows(b, i)[1])
    assert max(abs(a[j] - w[j]) for a, w in (rows(1, i) for i in range(4, S)) for j in a) > 0.02


def test_the_uniform_mean_of_what_heads_would_add_is_the_output_of_the_attention():
    view = view_of(num_key_value_heads=2, output_bias=True)
    q, k, v, o = (np.asarray(a, np.float64) for a in (view.q, view.k, view.v, view.o))
    for b, i in zip(*np.nonzero(VALID)):
        total = 0
        for head in range(N):
            a, _ = attention_rows(view, head, 1.0)(b, i)
            total += sum(a[j] * N * v[b, head // 2, j] @ o[head] for j in a) / N
        np.testing.assert_allclose(view.out[b, i], total, atol=1e-5)


def test_sequences_of_more_than_one_block():
    router, length = similar(window=100), 140
    x = normal(5, length, D)
    probs = route(router, x, context(length)).probs
    e, W = alone(router, x), np.asarray(router.similarity[...], np.float64)
    for i in (0, 99, 100, 127, 128, 139):
        keys = slice(max(0, i - 99), i + 1)
        w = softmax(np.asarray(x[keys], np.float64) @ (np.asarray(x[i], np.float64) @ W) / D**0.5)
        np.testing.assert_allclose(probs[i], w @ e[keys], rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("weights", ["similarity", "uniform"])
def test_a_window_of_one_is_plain_top_k(weights):
    router, plain = similar(window=1, weights=weights), TopK(TopKConfig(2), Dims(E, D))
    mine = route(router, X, packed_context())
    other = route(P.replace(plain, {"kernel": router.kernel[...]}), X, packed_context())
    np.testing.assert_array_equal(mine.decision.experts, other.decision.experts)
    np.testing.assert_allclose(mine.decision.gates, other.decision.gates, rtol=1e-6)
    np.testing.assert_allclose(mine.logits, other.logits, rtol=1e-6)


def test_equal_tokens_choose_as_each_would_alone():
    x = jnp.tile(normal(1, 1, D), (B * S, 1))
    for router, ctx in ((similar(), packed_context()), (attentive(), packed_context(attention=view_of()))):
        np.testing.assert_allclose(route(router, x, ctx).probs, alone(router, x), rtol=1e-5)


def test_with_much_noise_the_weights_are_those_of_the_attention():
    router, view = attentive(head=1, sigma=1e6), view_of()
    check(router, route(router, X, packed_context(attention=view)), lambda b, i: attention_rows(view, 1, 1.0)(b, i)[0])


def test_sharp_weights_on_more_certain_tokens_add_no_entropy_and_on_all_they_may():
    """The paper's proposition 1: H(p_i) <= H(e_i), where w picks one of the tokens that are more certain than i."""
    grows = {}
    for informants in ("all", "more_certain"):
        router = similar(tau=1e-4, informants=informants)
        probs, e = route(router, X, context(B * S, batch=B)).probs, alone(router)
        grows[informants] = max(entropy(np.asarray(p)) - entropy(q) for p, q in zip(probs, e))
    assert grows["more_certain"] < 1e-5 and grows["all"] > 0.01


def test_gradients_reach_the_router_of_others_and_the_weights_unless_detached():
    def loss(router, x, view):
        probs = router(x, packed_context(attention=view)).probs.reshape(B, S, E)
        return (probs[1, 6] * jnp.arange(E)).sum()  # of a token in a document that begins at 2

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), allow_int=True))
    size = lambda a: float(jnp.abs(a).max())
    for detached in (False, True):
        router, by_x, _ = gradient(similar(detach_weights=detached), X, None)
        assert (size(router.similarity[...]) == 0) == detached and size(router.kernel[...]) > 0
        moved = jnp.abs(by_x.reshape(B, S, D)).max(-1) > 0
        np.testing.assert_array_equal(moved, [[False] * S, [2 <= s <= 6 for s in range(S)]])
        router, _, view = gradient(attentive(head=1, detach_weights=detached), X, view_of())
        assert size(router.kernel[...]) > 0
        for part in (view.q, view.k, view.v, view.o, view.out):
            assert (size(part) == 0) == detached
        assert size(view.q[:, 0]) == 0  # another head


def test_the_head_is_the_one_whose_rows_had_the_least_entropy_so_far():
    view = view_of(num_key_value_heads=2)
    q, k = (np.asarray(a, np.float64) for a in (view.q, view.k))
    total, count = np.zeros(N), 0
    for b, i in [(b, i) for b in range(B) for i in range(0, S, N) if VALID[b, i]]:  # every N-th and the last
        count += 1
        for n in range(N):
            keys = [j for j in range(S) if sees(b, i, j)]
            total[n] += entropy(softmax(np.array([q[b, n, i] @ k[b, n // 2, j] for j in keys])))
    stat = row_entropy(view)
    np.testing.assert_allclose(stat.value(), total / count, rtol=1e-4)
    stacked = jax.tree.map(lambda a: jnp.stack([a, 2 * a, 3 * a]), stat)  # as the scan over layers does
    np.testing.assert_allclose(stacked.value(), np.tile(total / count, (3, 1)), rtol=1e-4)
    router = attentive(head_decay=0.75)
    (new,) = router.after_step({"row_entropy": stat}).values()
    np.testing.assert_allclose(new, 0.25 * total / count, rtol=1e-4)
    ctx = packed_context(attention=view, train=True)
    for entropies in (new, jnp.roll(new, 1), jnp.roll(new, 2)):
        chosen = route(P.replace(router, {**P.arrays(router), "row_entropy": entropies}), X, ctx)
        assert set(chosen.aux.stats) == {"row_entropy"}
        fixed = route(attentive(head=int(np.argmin(entropies))), X, ctx)
        assert not fixed.aux.stats
        np.testing.assert_allclose(chosen.probs, fixed.probs, rtol=1e-6)


def test_no_array_has_a_place_for_every_pair_of_tokens():
    long = 1024
    ctx = RoutingContext(batch=1, seq=long, train=True)
    config = AttentionConfig(num_attention_heads=N, head_dim=H)
    attention = P.materialize(Attention(config, hidden_size=D, out_scale=1.0), 0)

    def attend_and_route(x):
        view = View(jnp.arange(long)[None]).with_rotary({attention.rotary_key}, x.dtype)
        seen = attention.observed(x[None], view)[2]
        return similar()(x, ctx).probs, attentive()(x, ctx.replace(attention=seen)).probs

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars)
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
                if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                    yield from sizes(getattr(inner, "jaxpr", inner))

    # nor does the backward pass keep one in parts
    kept = jax.eval_shape(lambda x: jax.vjp(lambda x: similar()(x, ctx).probs, x)[1], normal(0, long, D))
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) < long**2 / 4
    # the attention's own block of queries: all heads
    assert max(sizes(jax.make_jaxpr(attend_and_route)(normal(0, long, D)).jaxpr)) <= N * 128 * long


# ------------------------------------------------------------------------------------------------- in a whole decoder

ROUTERS = {
    "similarity": {"name": "similarity_aware", "informants": "more_certain", "window": 5},
    "attention": {"name": "attention_aware"},
}


@pytest.mark.parametrize("name", ROUTERS)
def test_decoding_behind_left_padding_and_packed_rows_equal_a_row_of_its_own(name):
    """Three documents: each alone, packed into one row, and decoded in chunks behind padding."""
    model = tiny_model(router={**ROUTERS[name], "init_std": 1.0}, attention={"num_attention_heads": 2})
    ids = np.random.default_rng(4).integers(0, 32, 8)
    forward = jax.jit(lambda t, s, p: model(t, segment_ids=s, positions=p, valid=s > 0)[0])
    line = lambda *parts: jnp.asarray(np.concatenate(parts)[None], jnp.int32)
    alone_, one, zero = np.arange(8), np.ones(8, int), np.zeros(8, int)
    whole = forward(line(ids, zero), line(one, zero), line(alone_, zero))[0, :8]
    packed = forward(line(ids[::-1], ids), line(one, 2 * one), line(alone_, alone_))[0, 8:]
    np.testing.assert_allclose(packed, whole, atol=2e-5)

    step = jax.jit(lambda t, p, v, cache: model(t, positions=p, valid=v, cache=cache)[::2])
    tokens, valid = line(zero[:3], ids), line(zero[:3], one) > 0
    positions, cache, parts, at = line(zero[:3], alone_), model.init_cache(1, 16), [], 0
    for n in (7, 2, 2):
        cut = np.s_[:, at : at + n]
        logits, cache = step(tokens[cut], positions[cut], valid[cut], cache)
        parts.append(logits[0])
        at += n
    np.testing.assert_allclose(np.concatenate(parts)[3:], whole, atol=2e-5)


def test_the_uniform_control_remembers_too():
    router = similar(weights="uniform", window=3)
    whole, cache, parts = route(router, X, context(B * S, batch=B)), router.init_cache(B, 12), []
    for at in (0, 3, 6):
        x = X.reshape(B, S, D)[:, at : at + 3].reshape(-1, D)
        positions = jnp.tile(jnp.arange(at, at + 3), B)
        part = route(router, x, context(B * 3, batch=B, positions=positions, cache=cache, at=jnp.int32(at)))
        cache = part.cache
        parts.append(part.probs.reshape(B, 3, E))
    np.testing.assert_allclose(np.concatenate(parts, 1).reshape(-1, E), whole.probs, rtol=1e-5)


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ConfigError, match="model.router.tau.*similarity"):
        tiny_config(router={"name": "similarity_aware", "weights": "uniform", "tau": 1.0})
    with pytest.raises(ConfigError, match="model.router.num_experts_per_tok: 5 .*num_experts=4"):
        tiny_config(router={"name": "attention_aware", "num_experts_per_tok": 5})
    with pytest.raises(ConfigError, match="model.router.head_decay.*1.0"):
        tiny_config(router={"name": "attention_aware", "head_decay": 1.0})
    with pytest.raises(ConfigError, match="model.router.head: 2 of num_attention_heads=2"):
        tiny_model(router={"name": "attention_aware", "head": 2})
    model = tiny_model(router={"name": "similarity_aware"}, layers="1*moe")
    with pytest.raises(ValueError, match="given decision.*'similarity_aware'.*memory"):
        model(jnp.zeros((1, 2), jnp.int32), cache=model.init_cache(1, 4), inputs={"given": jnp.zeros((1, 2))})


def test_flops_grow_with_the_tokens_that_are_seen():
    model = tiny_model(router={"name": "similarity_aware"}, layers="1*moe")
    plain = tiny_model(layers="1*moe")
    for context_ in (4.5, 100.0):
        extra = model.flops_per_token(context_) - plain.flops_per_token(context_)
        assert extra == 2 * 16 * 16 + 2 * (16 + 4) * context_
    assert similar(window=3).context_flops(100) == 2 * (D + E) * 3 == similar(window=3).context_flops(3)
    assert attentive().context_flops(10) == 2 * (5 * H + E) * 10 and attentive().flops_per_token(D) > 2 * D * E
