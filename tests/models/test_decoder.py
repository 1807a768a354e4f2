"""What a decoder computes: who sees whom, what padding may change, caches, segments, outside inputs."""

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from naive import context, jitted, normal, tiny_config, tiny_model

from moe_zoo.blocks.moe import MoE
from moe_zoo.core import param as P
from moe_zoo.core.aux import Stat
from moe_zoo.core.decision import TokenChoice
from moe_zoo.models.decoder import per_layer

B, S, V, E, L = 2, 12, 32, 4, 3
MIXED = {
    "layers": "1*dense 1*(moe:local moe)",
    "variants": {"local": {"attention": {"sliding_window": 3}}},
    "attention": {"num_attention_heads": 2, "num_key_value_heads": 1, "qk_norm": "head"},
    "shared_expert_size": 8,
    "shared_expert_gate": True,
    "ngram": {"orders": [2, 3], "buckets": 64, "init_std": 0.5},
}
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, V, (B, S))
ARANGE = np.broadcast_to(np.arange(S), (B, S))
ONES = np.ones((B, S), bool)


@pytest.fixture(scope="module")
def mixed():
    return tiny_model(**MIXED)


@pytest.fixture(scope="module")
def run(mixed):
    """(logits, losses, stats by layer) for tokens, positions, segments, validity, router bias [L, E]."""

    def forward(model, tokens, positions, segments, valid, bias):
        logits, aux, cache = model(
            tokens, positions=positions, segment_ids=segments, valid=valid, domain=segments - 1, num_domains=2,
            inputs={"router_bias": bias},
        )  # fmt: skip
        assert cache is None
        return logits, aux.losses, {path: (ids, aux.stats) for path, (ids, aux) in aux.layers.items()}

    compiled = jitted(mixed, forward)

    def call(tokens=TOKENS, positions=ARANGE, segments=ONES, valid=ONES, bias=np.zeros((L, E))):  # noqa: B008
        arrays = [jnp.asarray(a, jnp.int32) for a in (tokens, positions, segments)]
        logits, losses, layers = jax.device_get(compiled(*arrays, jnp.asarray(valid), jnp.asarray(bias, jnp.float32)))
        return logits, losses, dict(per_layer(layers))

    return call


def equal(ours, theirs, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol), ours, theirs)


def packed(*rows):
    """Tokens, positions, segments, validity of documents laid end to end; what is left holds garbage."""
    tokens, positions, segments = RNG.integers(0, V, (B, S)), np.zeros((B, S), int), np.zeros((B, S), int)
    places = {}
    for b, row in enumerate(rows):
        at = 0
        for name, document in row:
            cut = slice(at, at + len(document))
            tokens[b, cut], positions[b, cut], segments[b, cut] = document, np.arange(len(document)), name
            places[name], at = (b, cut), cut.stop
    return (tokens, positions, segments, segments > 0), places


@pytest.mark.parametrize("j", [0, 5, 11])
def test_a_token_changes_no_logits_before_it_and_all_of_its_own_row_behind_it(run, j):
    changed = TOKENS.copy()
    changed[0, j] = (changed[0, j] + 1) % V
    a, b = run()[0], run(changed)[0]
    equal(a[0, :j], b[0, :j], 1e-6)
    equal(a[1], b[1], 1e-6)
    assert (np.abs(a - b)[0, j:].max(-1) > 1e-4).all()


def test_packed_documents_equal_separate_ones_in_logits_losses_and_statistics(run):
    one, two = RNG.integers(0, V, 7), RNG.integers(0, V, 5)
    together, where = packed([(1, one), (2, two)], [])
    apart, elsewhere = packed([(1, one)], [(2, two)])
    a, b = run(*together), run(*apart)
    for name in (1, 2):
        equal(a[0][where[name]], b[0][elsewhere[name]])
    equal(a[1:], b[1:])


def test_padding_changes_no_logits_losses_or_statistics(run):
    (tokens, positions, segments, valid), _ = packed([(1, RNG.integers(0, V, 4))], [(1, RNG.integers(0, V, 9))])
    a, b = run(tokens, positions, segments, valid), run(np.where(valid, tokens, 7), positions, segments, valid)
    equal(a[0][valid], b[0][valid])
    equal(a[1:], b[1:])
    for stats in a[2].values():
        assert stats["load"].sum() == 2 * valid.sum() == stats["load_by_domain"].sum()
        assert stats["experts_per_token"] == pytest.approx(2) and 0 < stats["entropy"] < np.log(E)


def test_left_padding_equals_none(run):
    document = TOKENS[0, :8]
    valid = np.stack([np.arange(S) >= 4, np.arange(S) < 8])
    tokens = np.where(valid, 0, 9)
    tokens[valid] = np.tile(document, 2)
    positions = np.maximum(np.cumsum(valid, 1) - 1, 0)
    logits = run(tokens, positions, ONES, valid)[0]
    equal(logits[0, 4:], logits[1, :8])


def test_positions_left_out_follow_padding_and_documents():
    """Who gives `valid` and `segment_ids` alone gets the same as who spells out the positions."""
    (tokens, positions, segments, valid), _ = packed([(1, TOKENS[0, :5]), (2, TOKENS[1, :4])], [(1, TOKENS[1])])
    model = tiny_model(layers="dense", ngram=MIXED["ngram"])
    left_out = lambda m, t, s, v: m(t, segment_ids=s, valid=v)[0]
    spelled = lambda m, t, s, v: m(t, segment_ids=s, valid=v, positions=jnp.asarray(positions, jnp.int32))[0]
    arrays = jnp.asarray(tokens, jnp.int32), jnp.asarray(segments, jnp.int32), jnp.asarray(valid)
    a, b = (np.asarray(jitted(model, call)(*arrays)) for call in (left_out, spelled))
    equal(a[valid], b[valid])


def test_cached_decoding_token_by_token_equals_the_parallel_form(mixed, run):
    cached = jitted(mixed, lambda model, tokens, cache: model(tokens, cache=cache)[::2])
    cache, parts = mixed.init_cache(B, S + 3), []
    for at in range(S):
        logits, cache = cached(jnp.asarray(TOKENS[:, at : at + 1], jnp.int32), cache)
        parts.append(np.asarray(logits))
    equal(np.concatenate(parts, 1), run()[0])
    assert int(cache["at"]) == S


def test_a_cache_refuses_packed_documents_or_keeps_them_apart():
    model = tiny_model(layers="dense")
    (tokens, positions, segments, valid), _ = packed([(1, TOKENS[0, :7]), (2, TOKENS[1, :5])], [])
    arrays = dict(positions=jnp.asarray(positions), segment_ids=jnp.asarray(segments), valid=jnp.asarray(valid))
    ids = jnp.asarray(tokens, jnp.int32)
    try:
        logits = jitted(model, lambda m, t: m(t, cache=m.init_cache(B, S), **arrays)[0])(ids)
    except (ValueError, NotImplementedError):
        return
    parallel = jitted(model, lambda m, t: m(t, **arrays)[0])(ids)
    equal(np.asarray(logits)[valid], np.asarray(parallel)[valid])


def test_bias_from_outside_steers_its_own_layer_only(run):
    bias = np.zeros((L, E))
    bias[0], bias[2, [1, 2]] = 99, 10  # layer 0 is dense and has nothing to steer
    plain, steered = run()[2], run(bias=bias)[2]
    np.testing.assert_array_equal(steered[2]["load"], [0, B * S, B * S, 0])
    np.testing.assert_array_equal(steered[1]["load"], plain[1]["load"])
    assert (plain[2]["load"] != steered[2]["load"]).any() and plain.keys() == {1, 2}


def test_given_decisions_are_taken_layer_by_layer_and_have_no_losses():
    model = tiny_model(layers="1*dense 2*moe", moe_intermediate_size=4)
    experts = RNG.permuted(np.broadcast_to(np.arange(E), (3, B * S, E)), axis=-1)[..., :2]
    given = TokenChoice(jnp.asarray(experts, jnp.int32), jnp.full(experts.shape, 0.5), E)
    valid = ARANGE < 9
    forward = lambda m, t, v: m(t, valid=v, inputs={"given": given})[:2]
    logits, aux = jax.device_get(jitted(model, forward)(jnp.asarray(TOKENS, jnp.int32), jnp.asarray(valid)))
    loads = {i: s["load"] for i, s in per_layer({p: (ids, a.stats) for p, (ids, a) in aux.layers.items()})}
    for layer in (1, 2):
        expected = np.bincount(experts[layer][valid.ravel()].ravel(), minlength=E)
        np.testing.assert_array_equal(loads[layer], expected)
    assert aux.losses == {} and np.isfinite(logits).all()


def test_a_recorded_decision_reproduces_the_layer_and_another_one_does_not():
    layer = P.materialize(MoE(tiny_config().moe(), hidden_size=16, out_scale=1.0), 0)
    x = normal(0, B, S, 16)

    @jax.jit
    def both(x):
        y, _, routing = layer(x, context(B * S, batch=B))
        again, _, _ = layer(x, context(B * S, batch=B, inputs={"given": routing.decision}))
        swapped = TokenChoice(routing.decision.experts[::-1], routing.decision.gates, E)
        return y, again, layer(x, context(B * S, batch=B, inputs={"given": swapped}))[0]

    y, again, other = both(x)
    np.testing.assert_array_equal(y, again)
    assert np.abs(y - other).max() > 0.1


def test_routed_layer_is_a_loop_over_tokens_plus_the_gated_shared_expert():
    config = tiny_config(shared_expert_size=8, shared_expert_gate=True)
    layer = P.materialize(MoE(config.moe(), hidden_size=16, out_scale=1.0), 0)
    x, w = normal(1, B, 3, 16), {n: np.asarray(a, np.float64) for n, a in P.arrays(layer).items()}
    y, _, _ = jax.jit(lambda x: layer(x, context(B * 3, batch=B)))(x)
    tokens = np.asarray(x, np.float64).reshape(-1, 16)
    experts, gates = naive.top_k(tokens @ w["router.kernel"], 2)
    expected = naive.moe(tokens, experts, gates, [w[f"experts.{n}"] for n in ("w_gate", "w_up", "w_down")])
    for t, token in enumerate(tokens):
        shared = naive.ffn(token, w["shared.w_gate"], w["shared.w_up"], w["shared.w_down"])
        expected[t] += naive.sigmoid(token @ w["shared_gate"]) * shared
    np.testing.assert_allclose(np.asarray(y).reshape(-1, 16), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("unrolled")
def test_segments_do_not_change_what_is_computed():
    """Five layers: scanned in a real loop with a remainder, and as one and two pairs."""
    outputs = []
    for layers in ("5*moe", "1*moe 2*(moe moe)"):
        logits, aux = jax.device_get(
            jitted(tiny_model(layers=layers), lambda m, t: m(t)[:2])(jnp.asarray(TOKENS, jnp.int32))
        )
        outputs.append((logits, aux.losses, dict(per_layer({p: (ids, a.stats) for p, (ids, a) in aux.layers.items()}))))
    equal(outputs[0], outputs[1])
    assert outputs[0][2].keys() == set(range(5))
    losses = [float(sum(s[n] for s in outputs[0][2].values())) for n in ("load_balance", "z_loss")]
    assert outputs[0][1]["load_balance"] == pytest.approx(0.01 * losses[0], rel=1e-4)
    assert outputs[0][1]["z_loss"] == pytest.approx(0.001 * losses[1], rel=1e-4)


def test_after_step_moves_each_layer_by_its_own_load():
    router = {"name": "top_k", "score_function": "sigmoid", "correction_bias": True, "bias_update_rate": 0.25}
    model = tiny_model(layers="1*dense 2*moe 1*moe", router=router)
    one, two = "segments.1.blocks.0", "segments.2.blocks.0"
    loads = {one: jnp.array([[9, 1, 1, 1], [3, 3, 3, 3]]), two: jnp.array([[0, 0, 4, 8]])}
    new = model.after_step({path: {"load": Stat.sum(load)} for path, load in loads.items()})
    assert new.keys() == {f"{p}.ffn.router.correction" for p in (one, two)} <= P.flat(model).keys()
    np.testing.assert_array_equal(new[f"{one}.ffn.router.correction"], [[-0.25, 0.25, 0.25, 0.25], [0, 0, 0, 0]])
    np.testing.assert_array_equal(new[f"{two}.ffn.router.correction"], [[0.25, 0.25, -0.25, -0.25]])


def test_tied_logits_are_those_of_a_head_that_holds_the_table():
    tied, untied = tiny_model(layers="dense", tie_word_embeddings=True), tiny_model(layers="dense")
    table = np.asarray(tied.embed.table[...])
    untied = P.replace(untied, {**P.arrays(untied), **P.arrays(tied), "head.kernel": jnp.asarray(table.T)})
    a, b = (np.asarray(jitted(m, lambda m, t: m(t)[0])(jnp.asarray(TOKENS, jnp.int32))) for m in (tied, untied))
    equal(a, b)
    assert np.abs(a).max() > 0.02


def test_low_precision_runs_close_to_float32_and_returns_float32():
    ids = jnp.asarray(TOKENS, jnp.int32)
    both = [tiny_model(layers="1*moe", dtype=dtype) for dtype in ("bfloat16", "float32")]
    (low, aux), (wide, _) = (jax.device_get(jitted(m, lambda m, t: m(t)[:2])(ids)) for m in both)
    assert low.dtype == np.float32 and all(v.dtype == np.float32 for v in aux.losses.values())
    assert np.isfinite(low).all() and 0 < np.median(np.abs(low - wide)) < 0.05
