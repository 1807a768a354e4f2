"""The Routing Transformer's mixer: against a loop over tokens, its invariants, k-means, who sees ahead, caches."""

import functools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from naive import normal, tiny_config

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build
from moe_zoo.layers.attention import Attention, AttentionConfig, View
from moe_zoo.mixers import clusters
from moe_zoo.mixers.routed_attention import RoutedAttention, RoutedAttentionConfig
from moe_zoo.models import Decoder
from moe_zoo.sharding import MeshConfig, batch_sharding, make_mesh, sharding_of

B, S, D, N, LOCAL, H, K, W = 2, 14, 16, 4, 2, 4, 3, 5
#: two documents a row, padding in between and before
VALID = np.ones((B, S), bool)
VALID[0, 4] = VALID[1, 0] = False
SEGMENTS = np.where(np.arange(S) < 5, 1, 2) * np.ones((B, 1), int)
# how it is called -> settings, whether it trains, whether it may depend on later tokens
FORMS = {
    "topk, training": (dict(count_eps=0.01), True, True),
    "topk, training, two streams": (dict(share_qk=False, vectors="plain", sees_itself=False), True, True),
    "topk, inference": (dict(vectors="unit", sees_itself=False, temperature=0.3), False, False),
    "topk, inference, two streams": (dict(share_qk=False), False, False),
    "argmax, training": (dict(assignment="token_argmax", sees_itself=False, count_eps=0.01), True, False),
}


def made(heads: int = N, **settings) -> RoutedAttention:
    settings = {"local_heads": LOCAL, "local_window": 3, "num_clusters": K, "window": W} | settings
    config, attention = build(RoutedAttentionConfig, settings, "mixer"), AttentionConfig(heads)
    return P.materialize(
        RoutedAttention.build(config, attention, hidden_size=D, out_scale=1.0, num_layers=1), 0
    )  # fmt: skip


call = jax.jit(lambda mixer, x, view, cache: mixer(x, view.with_rotary({mixer.rotary_key}, jnp.float32), cache))


def look(mixer, x, train=False, valid=None, segments=None, positions=None, cache=None):
    """(output, cache, Aux) of the mixer."""
    positions = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2]) if positions is None else positions
    return call(mixer, x, View(jnp.asarray(positions), segments, valid, train=train), cache)


def places(valid, segments):
    """Positions that restart with each document and pass over padding."""
    at = np.zeros((B, S), int)
    for b in range(B):
        for t in range(S):
            at[b, t] = sum(valid[b, s] and segments[b, s] == segments[b, t] for s in range(t))
    return at


def by_loop(mixer, x, train):
    """Token by token, head by head, cluster by cluster."""
    c, at = mixer.config, places(VALID, SEGMENTS)
    w = {name: np.asarray(a, np.float64) for name, a in P.arrays(mixer).items()}
    x, out = np.asarray(x, np.float64), np.zeros((B, S, D))
    norm = {
        "normed": lambda r: naive.layer_norm(r, 1, 0, 1e-6),
        "unit": lambda r: r / np.linalg.norm(r),
        "plain": lambda r: r,
    }[c.vectors]
    turn = lambda r, b, t: naive.rope(r, at[b, t], 1e4)
    for b in range(B):
        real = [t for t in range(S) if VALID[b, t]]
        sees = lambda t, s, b=b: s <= t and SEGMENTS[b, s] == SEGMENTS[b, t]
        for n in range(N):
            q = {t: x[b, t] @ w["q"][:, n] for t in real}
            k = {t: x[b, t] @ w["k"][:, n] for t in real} if n < mixer.own_keys else q
            v = {t: x[b, t] @ w["v"][:, n] for t in real}

            def mixed(t, keys, asks, answers, scale, itself=True, v=v, b=b):
                keys = keys if itself else [s for s in keys if s != t] or keys
                if not keys:
                    return np.zeros(H)
                weights = naive.softmax(np.array([turn(asks(t), b, t) @ turn(answers(s), b, s) for s in keys]) * scale)
                return sum(p * v[s] for p, s in zip(weights, keys))

            for t in real:
                if n < LOCAL:
                    keys = [s for s in real if sees(t, s)][-3:]
                    out[b, t] += mixed(t, keys, q.get, k.get, 0.5) @ w["o"][n]
                    continue
                mu = w["means"][n - LOCAL]
                score = lambda z, s, c_, mu=mu: norm(z[s]) @ mu[c_]
                among = real if train else [s for s in real if sees(t, s)]
                asks = (lambda s, q=q: norm(q[s])) if c.vectors == "normed" else q.get
                own = c.vectors == "normed" or (c.vectors == "unit" and c.share_qk)
                answers = (lambda s, k=k: norm(k[s])) if own else k.get
                total, count = np.zeros(H), 0
                for cluster in range(K):
                    if c.assignment == "token_argmax":
                        nearest = lambda s, q=q, score=score: max(range(K), key=lambda i: score(q, s, i))
                        keys = [s for s in real if sees(t, s) and nearest(s) == cluster][-W:]
                        member = nearest(t) == cluster
                    else:
                        best = lambda z, among=among, score=score, cluster=cluster: [
                            among[i] for i in naive.best([score(z, s, cluster) for s in among], W)
                        ]
                        member = t in best(q)
                        keys = [s for s in sorted(best(k)) if sees(t, s)]
                    if member:
                        count += 1
                        total += mixed(t, keys, asks, answers, 1 / (c.temperature or 2.0), c.sees_itself)
                out[b, t] += total / max(count + c.count_eps, 1e-9) @ w["o"][n]
    return out


@pytest.mark.parametrize("form", FORMS)
def test_output_is_that_of_the_loop_and_only_what_may_sees_the_future(form):
    settings, train, ahead = FORMS[form]
    mixer, x = made(**settings), normal(3, B, S, D)
    how = (train, jnp.asarray(VALID), jnp.asarray(SEGMENTS), places(VALID, SEGMENTS))
    y = np.asarray(look(mixer, x, *how)[0])
    np.testing.assert_allclose(y[VALID], by_loop(mixer, x, train)[VALID], rtol=0, atol=2e-5)
    # other last tokens: what came before must not notice
    other = [np.asarray(look(mixer, x.at[:, -1].set(normal(i, B, D, scale=3.0)), *how)[0]) for i in range(4)]
    change = max(np.abs(o - y)[:, :-1][VALID[:, :-1]].max() for o in other)
    assert change > 1e-3 if ahead else change < 1e-6, change


def test_one_cluster_of_all_tokens_is_full_attention():
    x, settings = normal(1, B, S, D), dict(local_heads=0, num_clusters=1, window=S, vectors="plain", share_qk=False)
    for train in (True, False):
        for count_eps in (0.0, 0.01) if train else (0.0,):
            mixer = made(**settings, count_eps=count_eps)
            full = P.replace(
                Attention(AttentionConfig(N), hidden_size=D, out_scale=1.0), {n: P.arrays(mixer)[n] for n in "qkvo"}
            )
            expected = look_full(full, x)
            np.testing.assert_allclose(look(mixer, x, train)[0], expected / (1 + count_eps), rtol=0, atol=1e-5)


@jax.jit
def look_full(full, x):
    view = View(jnp.broadcast_to(jnp.arange(S), (B, S)))
    return full(x, view.with_rotary({full.rotary_key}, jnp.float32))[0]


def test_each_cluster_has_its_number_of_members_of_different_tokens():
    a_BNSK = normal(0, B, N, S, K)
    chosen = np.asarray(clusters.best(a_BNSK, jnp.ones((B, S), bool), W))
    for b, n, c in np.ndindex(B, N, K):
        assert sorted(naive.best(list(np.asarray(a_BNSK)[b, n, :, c]), W)) == chosen[b, n, c].tolist()
    heads = clusters.Heads(*(normal(i, B, N, S, H) for i in range(3)))
    group = jnp.zeros((B, S), int)
    _, count = clusters.within_chosen(heads, chosen, chosen, group == 0, group, 1.0, True)
    assert count.sum() == B * N * K * W and count.min() == 0 and count.max() > 1


def test_one_step_without_memory_is_one_iteration_of_lloyds():
    points, means = np.array(normal(0, B, 1, S, H)), np.array(normal(1, 1, K, H))
    means[0, 2] = 100.0  # far from all
    distance = ((points[..., None, :] - means[:, None]) ** 2).sum(-1)
    nearest = distance.argmin(-1)
    new, sums = clusters.assigned(jnp.asarray(points), jnp.asarray(nearest), jnp.ones((B, S), bool), K)
    after, counts = clusters.averaged(means, normal(2, 1, K) ** 2, new, sums, decay=0.0, eps=0.0)
    by_hand = [points[nearest == c].mean(0) if (nearest == c).any() else means[0, c] for c in range(K)]
    np.testing.assert_allclose(after[0], by_hand, rtol=1e-5)
    assert (nearest == 2).sum() == 0 and counts.sum() == B * S
    # where it is at rest, it stays, whatever it remembers
    again, _ = clusters.averaged(after, counts, new, sums, decay=0.9, eps=0.0)
    np.testing.assert_allclose(again, after, rtol=1e-5)


@pytest.mark.parametrize("vectors", ["normed", "unit"])
def test_means_follow_the_formula_and_commitment_is_zero_where_all_are_at_their_mean(vectors):
    mixer, x = made(vectors=vectors, decay=0.9, commitment=1.0, eps=0.1), normal(5, B, S, D)
    aux, values = look(mixer, x, True)[2], {n: np.asarray(a, np.float64) for n, a in P.arrays(mixer).items()}
    new = mixer.after_step(aux.stats)
    r = np.einsum("bsd,dnh->bnsh", np.asarray(x, np.float64), values["q"])[:, LOCAL:]
    r = naive.layer_norm(r, 1, 0, 1e-6) if vectors == "normed" else r / np.linalg.norm(r, axis=-1, keepdims=True)
    loss = 0
    for n in range(N - LOCAL):
        nearest = (r[:, n] @ values["means"][n].T).argmax(-1)
        loss += ((r[:, n] - values["means"][n][nearest]) ** 2).mean() / (N - LOCAL)
        count = np.bincount(nearest.reshape(-1), minlength=K)
        sums = np.stack([r[:, n][nearest == c].sum(0) for c in range(K)])
        if vectors == "unit":
            length = np.linalg.norm(sums, axis=-1, keepdims=True)
            expected = np.where(
                length > 0, 0.9 * values["means"][n] + 0.1 * sums / np.maximum(length, 1e-9), values["means"][n]
            )
        else:
            smooth = lambda m: (m + 0.1) / (m.sum() + K * 0.1) * m.sum()
            before, after = values["counts"][n], 0.9 * values["counts"][n] + 0.1 * count
            total = 0.9 * values["means"][n] * smooth(before)[:, None] + 0.1 * sums
            expected = total / smooth(after)[:, None]
        np.testing.assert_allclose(new["means"][n], expected, rtol=1e-4, atol=1e-5)
    assert aux.losses["commitment"] == pytest.approx(loss, rel=1e-4)
    same = jnp.broadcast_to(x[:1, :1], x.shape)
    there = jnp.broadcast_to(jnp.asarray(r[0, :, :1], jnp.float32), mixer.means[...].shape)
    mixer = P.replace(mixer, P.arrays(mixer) | {"means": there})
    assert look(mixer, same, True)[2].losses["commitment"] < 1e-10


def test_gradients_reach_what_they_should_and_no_mean():
    mixer, x, weights = made(share_qk=False), normal(5, B, S, D), normal(6, B, S, D)
    view = View(jnp.broadcast_to(jnp.arange(S), (B, S)), train=True).with_rotary({mixer.rotary_key}, jnp.float32)

    @jax.jit
    @functools.partial(jax.jacrev, argnums=0)
    def grads(values):
        y, _, aux = P.replace(mixer, values)(x, view)
        return {"out": (y * weights).sum(), "commitment": aux.losses["commitment"]}

    found = grads(P.arrays(mixer))
    assert all(np.abs(found["out"][name]).max() > 1e-3 for name in "qkvo")
    assert not found["out"]["means"].any() and not found["commitment"]["means"].any()
    assert not found["commitment"]["v"].any() and not found["commitment"]["o"].any()
    for name in "qk":
        assert (
            np.abs(found["commitment"][name][:, LOCAL:]).max() > 1e-7 and not found["commitment"][name][:, :LOCAL].any()
        )


def test_what_a_cluster_chose_so_far_is_all_that_it_needs_to_go_on():
    """Positions as given, padding between, fewer places than members: text of at most 14 tokens."""
    for settings in (dict(share_qk=False, vectors="plain"), dict(clusters="random", window=3)):
        mixer, x = made(**settings), normal(3, B, S, D)
        whole = look(mixer, x)[0]
        cache, parts = mixer.init_cache(B, S, jnp.float32), []
        for first, last in ((0, 7), (7, 14)):
            valid = np.ones((B, 7), bool)
            positions = np.broadcast_to(np.arange(first, last), (B, 7))
            y, cache, _ = look(mixer, x[:, first:last], False, jnp.asarray(valid), None, positions, cache)
            parts.append(y)
        np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=0, atol=1e-5)


def test_on_a_mesh_every_device_has_the_means_of_one_device():
    mixer, x = made(), normal(5, 8, S, D)
    view = View(jnp.broadcast_to(jnp.arange(S), (8, S)), train=True).with_rotary({mixer.rotary_key}, jnp.float32)

    @jax.jit
    def step(mixer, x, view):
        y, _, aux = mixer(x, view)
        return y, mixer.after_step(aux.stats), aux.losses

    alone = jax.device_get(step(mixer, x, view))
    mesh, variables = make_mesh(MeshConfig(data=4, tensor=2)), P.flat(mixer)
    place = lambda n, a: jax.device_put(a, sharding_of(mesh, variables[n].logical_axes, a.shape, n))
    placed = P.replace(mixer, {n: place(n, a) for n, a in P.arrays(mixer).items()})
    many = step(placed, *jax.device_put((x, view), batch_sharding(mesh)))
    for expected, found in zip(jax.tree.leaves(alone), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    for shard in many[1]["means"].addressable_shards:
        np.testing.assert_allclose(shard.data, alone[1]["means"][shard.index], rtol=1e-5, atol=1e-6)


def test_a_model_is_causal_but_as_it_was_trained():
    model = Decoder(tiny_config(layers="2*dense:routed_attention", attention={"num_attention_heads": 4}))
    assert model.causal and model.competes and not model.as_trained().causal and model.causal
    leak_free = Decoder(tiny_config(layers="2*dense", mixer={"name": "routed_attention", "assignment": "token_argmax"}))
    assert leak_free.causal and not leak_free.competes and leak_free.as_trained().causal


def test_flops_are_those_counted_by_hand():
    mixer, context = made(share_qk=False), 7.5
    projections = 4 * 2 * D * N * H
    local, means = 4 * LOCAL * H * 3, 2 * 2 * (N - LOCAL) * K * H
    pairs = K * W * (W + 1) / 2 / 14
    assert mixer.flops_per_token(context) == projections + local + means + 4 * (N - LOCAL) * H * pairs
    own = made(assignment="token_argmax").flops_per_token(context)
    assert own == projections - 2 * D * (N - LOCAL) * H + local + means / 2 + 4 * (N - LOCAL) * H * W


@pytest.mark.parametrize("mixer, others, words", [
    ({"assignment": "token_argmax", "share_qk": False}, {}, "share_qk.*centroid_topk"),
    ({"local_heads": 2}, {}, "local_heads: 2.*at most 1"),
    ({"decay": 1.0}, {}, "decay: 1.0"),
    ({}, {"attention": {"num_attention_heads": 2, "sinks": True}}, "attention.sinks.*rope_theta"),
    ({}, {"layers": "1*shortcut"}, "routed_attention.*dense or moe"),
])  # fmt: skip
def test_what_cannot_be_is_refused_by_name(mixer, others, words):
    with pytest.raises(ConfigError, match=words):
        Decoder(tiny_config(mixer={"name": "routed_attention"} | mixer, **others))
