"""FTP: against a loop, exact invariants, who sees the future, caches, what the losses teach, the genetic search."""

import functools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from naive import normal, tiny_config, tiny_model

from moe_zoo.core import param as P
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.registry import ConfigError
from moe_zoo.depth.genetic import Evolution
from moe_zoo.inference import Loaded
from moe_zoo.models import Decoder
from moe_zoo.train.distill import Distill, DistillConfig
from moe_zoo.train.step import partition
from moe_zoo.transform import search_sparsities

B, S, L, N = 3, 10, 2, 2
IDS = np.random.default_rng(3).integers(0, 32, (B, S)).astype(np.int32)
PROMPT = np.arange(S) < np.array([[4], [6], [5]])
SPARSITIES = [0.4, 0.3]


@functools.cache
def decoder(**settings):
    """A decoder whose attention takes sides, and whose routers do."""
    depth = {"name": "ftp", "sparsities": SPARSITIES, "keep_first": 1, "keep_last": 1}
    made = tiny_model(layers=f"{L}*dense", depth=depth | settings, losses={})
    values = P.arrays(made)
    large = {n: 4 * a for n, a in values.items() if n.endswith(("mixer.q", "mixer.k", "mixer.v"))}
    large |= {n: 60 * a for n, a in values.items() if n.startswith("embed.")}
    routers = sorted(n for n in values if ".selector." in n or n.startswith("shared."))
    own = {n: normal(281 + i, *values[n].shape) for i, n in enumerate(routers)}
    return P.replace(made, values | large | own)


@functools.cache
def read(train: bool = False, **settings):
    """Logits and who went through each layer [L, B, S], of (ids, prompt, inputs)."""
    made = decoder(**settings)

    def run(ids, prompt, inputs):
        logits, aux, _ = made(ids, prompt=prompt, inputs=inputs, record=True, train=train)
        return logits, next(iter(aux.layers.values()))[1].terms["depth_through"], aux.losses

    return jax.jit(run)


def weights(made):
    """Layer by layer, and the rest, in float64."""
    values = {n: np.asarray(a, np.float64) for n, a in P.arrays(made).items()}
    inside = "segments.0.blocks.0."
    all_layers = {n.replace("shared.depth", "selector"): a for n, a in values.items() if n.startswith("shared.")}
    layer = lambda r: {n.removeprefix(inside): a[r] for n, a in values.items() if n.startswith(inside)} | all_layers
    return [layer(r) for r in range(L)], values


def looks_by_loop(w, h, seen):
    """Weights of attention [n, n], the mean over heads, over the keys that are seen."""
    n, out = len(h), np.zeros((len(h), len(h)))
    turned = lambda w, i: [naive.rope(q, i, 1e4) for q in np.einsum("d,dnh->nh", h[i], w)]
    for i in range(n):
        keys = [j for j in range(i + 1) if seen[j]]
        q, k = turned(w["mixer.q"], i), {j: turned(w["mixer.k"], j) for j in keys}
        for m in range(N):
            if keys:
                out[i, keys] += naive.softmax(np.array([q[m] @ k[j][m] / np.sqrt(len(q[m])) for j in keys])) / N
    return out


def row_by_loop(layers, ids, prompt, kv_for_skipped, table):
    """(hidden states, who goes through each layer, what the static router keeps) of one row, token by token."""
    x, n, a = table[ids].copy(), len(ids), np.zeros(len(ids))
    went, kept = [], []
    for w, s in zip(layers, SPARSITIES):
        go, stay = np.zeros(n, bool), np.zeros(n, bool)
        for t in range(n):
            others = [j for j in range(n) if j <= t or (prompt[t] and prompt[j])]
            forced = [j for j in others if prompt[t] and (j == 0 or j == len(others) - 1)]
            forced += [j for j in np.flatnonzero(prompt) if not prompt[t] and j in (0, prompt.sum() - 1)]
            above = lambda score, t=t, others=others: sum(
                score[j] > score[t] or (score[j] == score[t] and j < t) for j in others
            )
            u = np.array([sum(j < t for j in others) / len(others), a[t], above(a) / len(others), s])
            z = np.maximum(u @ w["selector.hidden_in"] + w["selector.hidden_bias"], 0) @ w["selector.out"]
            z = z + w["selector.out_bias"]
            go[t] = z[1] >= z[0] or t in forced
            first = np.where([j in forced for j in range(n)], np.inf, a)
            stay[t] = above(first) < len(others) - round(s * len(others))
        seen = np.ones(n, bool) if kv_for_skipped else go
        h = np.stack([naive.rms_norm(t, w["mixer_norm.scale"], 1e-6) for t in x])
        mixed = naive.attention(
            h[None], *(w[f"mixer.{c}"] for c in "qkvo"), sees=lambda _, i, j, seen=seen: j <= i and seen[j],
            positions=np.arange(n)[None], theta=1e4,
        )[0]  # fmt: skip
        y = x + mixed
        feed = lambda t, w=w: naive.ffn(
            naive.rms_norm(t, w["ffn_norm.scale"], 1e-6), *(w[f"ffn.w_{c}"] for c in ("gate", "up", "down"))
        )
        y = y + np.stack([feed(t) for t in y])
        p, before = looks_by_loop(w, h, seen), a.copy()
        for t in range(n):
            asked = [i for i in range(t, n) if go[i] and seen[t] and (i == t or (prompt[i] and prompt[t]))]
            if asked:
                a[t] = np.mean([p[i, t] * sum(seen[: i + 1]) for i in asked])
            else:
                a[t] = before[t]
        x = np.where(go[:, None], y, x)
        went.append(go)
        kept.append(stay)
    return x, np.array(went), np.array(kept)


@pytest.mark.parametrize("kv_for_skipped, share_router", [(True, False), (False, False), (True, True)])
def test_output_is_that_of_the_loop_and_training_says_the_same(kv_for_skipped, share_router):
    settings = {"kv_for_skipped": kv_for_skipped} | ({"share_router": True} if share_router else {})
    made = decoder(**settings)
    layers, values = weights(made)
    again, times, _ = read(**settings)(IDS, PROMPT, {})
    rows = [row_by_loop(layers, IDS[b], PROMPT[b], kv_for_skipped, values["embed.table"]) for b in range(B)]
    went = np.stack([row[1] for row in rows], 1)
    np.testing.assert_array_equal(times, went)
    for b in range(B):
        logits = naive.rms_norm(rows[b][0], values["norm.scale"], 1e-6) @ values["head.kernel"]
        np.testing.assert_allclose(again[b], logits, rtol=2e-3, atol=2e-3)
    assert all(0 < went[r].sum() < B * S for r in range(L))
    if kv_for_skipped and not share_router:
        found, same, losses = read(train=True, kv_for_skipped=True)(IDS, PROMPT, {})
        np.testing.assert_array_equal(times, same)
        np.testing.assert_allclose(found, again, atol=1e-5)
        expected = sum((went[r].mean() - (1 - SPARSITIES[r])) ** 2 for r in range(L))
        assert float(losses["depth_sparsity"]) == pytest.approx(expected, rel=1e-4)
        fixed, kept, _ = read(router="static")(IDS, PROMPT, {})
        guided = [row_by_loop(layers, IDS[b], PROMPT[b], True, values["embed.table"])[2] for b in range(B)]
        # the first layer's static router has seen the same as the dynamic one
        np.testing.assert_array_equal(kept[0], np.stack(guided, 1)[0])
        for b in range(B):
            n = PROMPT[b].sum()
            assert [kept[r, b, :n].sum() for r in range(L)] == [n - round(s * n) for s in SPARSITIES]
            assert kept[:, b, 0].all() and kept[:, b, n - 1].all()


@functools.cache
def plain_logits(layers: int):
    """Of the model without selectors, and of its last layer alone."""
    bare = tiny_model(layers=f"{layers}*dense", losses={})
    values = P.arrays(decoder())
    cut = lambda n: values[n][L - layers :] if n.startswith("segments") else values[n]
    bare = P.replace(bare, {n: cut(n) for n in P.arrays(bare)})
    return np.asarray(jax.jit(lambda ids: bare(ids)[0])(IDS))


@pytest.mark.parametrize("router", ["dynamic", "static"])
def test_no_sparsity_is_the_model_as_it_was_to_the_last_bit_and_all_of_it_removes_the_block(router):
    run = read(router=router)
    as_it_was, times, _ = run(IDS, PROMPT, {"depth_sparsity": jnp.zeros(L)})
    np.testing.assert_array_equal(as_it_was, plain_logits(L))
    assert (times == 1).all()
    without, times, _ = run(IDS, PROMPT, {"depth_sparsity": jnp.array([1.0, 0.0])})
    assert (times[0] == 0).all() and (times[1] == 1).all()
    np.testing.assert_allclose(without, plain_logits(1), atol=1e-5)


@pytest.mark.parametrize("router", ["hidden", "random"])
def test_routers_to_compare_with_read_the_hidden_state_or_draw(router):
    block = jax.tree.map(lambda a: a[0], decoder(router=router).segments[0].blocks[0])
    x, prompt = normal(3, B, S, 16), jnp.asarray(PROMPT)
    ctx = RoutingContext(
        batch=B, seq=S, prompt=prompt.reshape(-1), layer=jnp.int32(0), carry={"depth": jnp.zeros(B * S)}
    )
    chosen = np.asarray(jax.jit(lambda x, ctx: block.selector(x, ctx).chosen)(x, ctx))
    n = PROMPT.sum(1)
    ends = PROMPT & ((np.arange(S) == 0) | (np.arange(S) == n[:, None] - 1))
    if router == "hidden":
        np.testing.assert_array_equal(chosen, (x @ block.selector.kernel[...] + block.selector.bias[...] >= 0) | ends)
    else:
        assert [chosen[b, : n[b]].sum() for b in range(B)] == [k - round(SPARSITIES[0] * k) for k in n]
        assert chosen[ends].all() and 0 < chosen[~PROMPT].mean() < 1


def test_tokens_of_a_prompt_look_at_each_other_and_later_ones_at_nothing_to_come():
    futures = np.where(np.arange(S) < 6, IDS, np.random.default_rng(1).integers(0, 32, (20, B, S))).astype(np.int32)
    everything, run = np.ones_like(PROMPT), read()
    logits, times, _ = run(IDS, PROMPT, {})
    for ids in futures[:3]:
        moved, now, _ = run(ids, PROMPT, {})
        np.testing.assert_allclose(moved[:, :6], logits[:, :6], atol=1e-5)
        np.testing.assert_array_equal(now[:, :, :6], times[:, :, :6])
    whole = run(IDS, everything, {})[0]
    assert any(np.abs(run(ids, everything, {})[0] - whole)[:, :6].max() > 1e-3 for ids in futures)


@pytest.mark.parametrize("kv_for_skipped", [True, False])
def test_decoding_reads_as_the_whole_does_and_skips(kv_for_skipped):
    made, n = decoder(kv_for_skipped=kv_for_skipped), 5
    prompt = np.broadcast_to(np.arange(S) < n, (B, S))
    whole, times, _ = read(kv_for_skipped=kv_for_skipped)(IDS, prompt, {})
    step = jax.jit(lambda ids, cache: made(ids, cache=cache)[::2])
    cache, parts = made.init_cache(B, S + 2), []
    for part in np.split(IDS, range(n, S), axis=1):
        logits, cache = step(part, cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=5e-5)
    there = np.asarray(cache["segments"][0][0]["block"]["mixer"]["valid"]).sum(-1)
    np.testing.assert_array_equal(there, S if kv_for_skipped else times.sum(-1))
    assert 0 < times[:, :, n:].mean() < 1


def test_who_passes_by_is_not_computed_but_leaves_keys():
    """Weights that are not numbers go unnoticed where nobody goes."""
    made, cache = decoder(), decoder().init_cache(1, 4)
    broken = P.replace(made, {n: a * np.nan if ".ffn." in n else a for n, a in P.arrays(made).items()})
    nobody = {"depth_sparsity": jnp.ones(L)}
    logits, _, cache = jax.jit(lambda cache: broken(IDS[:1, :1], cache=cache, inputs=nobody))(cache)
    kept = cache["segments"][0][0]["block"]["mixer"]
    assert jnp.isfinite(logits).all() and kept["valid"][:, :, 0].all() and not kept["valid"][:, :, 1:].any()
    assert (jnp.abs(kept["k"][:, :, :, 0]).max(-1) > 0).all() and (jnp.abs(kept["v"][:, :, :, 0]).max(-1) > 0).all()


@pytest.mark.parametrize("own", [{}, {"share_router": True}])
def test_routers_alone_learn_and_distillation_is_nothing_where_nobody_passes_by(own):
    made, objective = decoder(**own), Distill(DistillConfig())
    routers = {n for n in P.arrays(made) if (n.startswith("shared.depth.") if own else ".selector." in n)}
    assert set(partition(made, ()).trainable) == routers and len(routers) == 4
    batch = {
        "tokens": IDS, "targets": np.roll(IDS, -1, 1), "segment_ids": np.ones((B, S), np.int32), "domain": None,
        "positions": np.tile(np.arange(S, dtype=np.int32), (B, 1)), "loss_weights": np.full((B, S), 1 / (B * S)),
    }  # fmt: skip

    def loss(values, sparsity):
        given = batch | {"inputs": {"depth_sparsity": jnp.full(L, sparsity)}}
        total, told = objective.loss(P.replace(made, values), given, {}, step=jnp.int32(0), key=None, fraction=1.0)
        return told["scalars"]["distillation"].value(), total

    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (apart, total), gradient = grad(P.arrays(made), 0.5)
    assert 0 < apart < total
    for name in partition(made, ()).trainable:
        if not name.endswith("out_bias"):
            assert float(jnp.abs(gradient[name]).max()) > 0, name
    assert float(grad(P.arrays(made), 0.0)[0][0]) == 0


def test_a_search_keeps_the_mean_never_gets_worse_and_finds_who_can_be_spared():
    need = np.array([9.0, 1.0, 0.2, 4.0, 0.1, 9.0])
    seen = []

    def cost(vectors):
        seen.append(vectors)
        return (need * vectors**2).sum(1)

    best, history = Evolution(generations=60).best(cost, 6, 0.25, whole=(0, -1))
    vectors = np.concatenate(seen)
    np.testing.assert_allclose(vectors.mean(1), 0.25, atol=1e-9)
    assert (vectors[:, [0, -1]] == 0).all() and vectors.min() >= 0 and vectors.max() <= 0.95
    assert (np.diff(history) <= 0).all() and history[-1] < 0.6 * cost(vectors[:1])[0]
    assert best[4] > best[2] > best[1] > best[3]
    with pytest.raises(ConfigError, match="mean: 0.9 of 6 blocks, 4 of them free"):
        Evolution().best(cost, 6, 0.9, whole=(0, 5))


def test_the_search_over_a_model_sets_its_sparsities():
    made = decoder(router="static")
    loaded = Loaded(made, made.config, None)
    found, history = search_sparsities(
        loaded, IDS, 0.3, prompt=PROMPT, evolution=Evolution(population=6, generations=3, elites=2), whole=()
    )
    each = found.config.depth.config.sparsities
    assert np.mean(each) == pytest.approx(0.3) and history[-1] <= history[0] and history[-1] > 0
    with pytest.raises(ConfigError, match="'ftp'"):
        search_sparsities(Loaded(made, tiny_config(), None), IDS, 0.3)


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ConfigError, match="depth.sparsities: expected numbers in"):
        tiny_config(depth={"name": "ftp", "sparsities": [1.5]})
    with pytest.raises(ConfigError, match="depth.share_router: expected router 'dynamic', got 'hidden'"):
        tiny_config(depth={"name": "ftp", "router": "hidden", "share_router": True})
    hidden = lambda size: {"depth": {"name": "ftp", "share_router": True, "router_hidden": size}}
    with pytest.raises(ConfigError, match="different sizes"):
        Decoder(tiny_config(layers="1*(dense:a dense:b)", variants={"a": hidden(8), "b": hidden(16)}))
    with pytest.raises(ConfigError, match="'ftp' looks at plain attention"):
        Decoder(tiny_config(depth={"name": "ftp"}, mixer={"name": "mamba2"}))
    with pytest.raises(ConfigError, match="see all tokens of a sequence or none"):
        tiny_config(depth={"name": "ftp"}, adapters={"name": "lora"})


def test_flops_are_those_counted_by_hand():
    """Who passes by costs keys and values if they are left, and nothing but the router if not."""
    D, F, V, context, share = 16, 24, 32, 10.0, 1 - np.mean(SPARSITIES)
    block = lambda seen: 8 * D * D + 4 * D * seen + 6 * D * F
    router = 2 * 32 * 6
    for keys in (True, False):
        through = share * block(context if keys else share * context) + (1 - share) * 4 * D * D * keys
        assert decoder(kv_for_skipped=keys).flops_per_token(context) == pytest.approx(
            L * (through + router) + 2 * D * V
        )
