"""Blocks that some tokens go through: against a loop over tokens, exact invariants, what sees the future, caches."""

import functools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from naive import normal, tiny_config, tiny_model

from moe_zoo.blocks.selective import best
from moe_zoo.core import param as P
from moe_zoo.core.aux import Aux
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.registry import ConfigError
from moe_zoo.depth import SELECTORS
from moe_zoo.depth.selector import Selection, Selector
from moe_zoo.layers.attention import View
from moe_zoo.models import Decoder
from moe_zoo.models.counting import count_parameters, router_parameters
from moe_zoo.sharding import MeshConfig, batch_sharding, make_mesh

B, S, D, C = 2, 12, 16, 6
call = jax.jit(lambda block, x, view, ctx: block(x, view, ctx)[:2])


class EverySecond(Selector):
    """Tokens of even numbers, and nobody competes."""

    competes = False

    def __call__(self, x_BSD, ctx):
        chosen_BS = ctx.positions.reshape(x_BSD.shape[:2]) % 2 == 0
        return Selection(x_BSD[..., 0], chosen_BS, jnp.ones_like(x_BSD[..., 0]))

    def learn(self, selection, best_BS, valid_BS):
        return Aux(losses={"budget": best_BS.sum() / valid_BS.sum()})


@functools.cache
def decoder(layers: str = "1*dense:some", **depth):
    """A decoder whose selectors have large scores."""
    depth = {"name": "mod", "capacity": C / S, "cache_factor": None} | depth
    router = {"name": "recurrent", "recurrent_size": 8, "init_std": 1.0}
    made = tiny_model(layers=layers, losses={}, router=router, variants={"some": {"depth": depth}})
    draw = {n: normal(14 + i, *a.shape) for i, (n, a) in enumerate(sorted(P.arrays(made).items())) if ".selector." in n}
    return P.replace(made, P.arrays(made) | draw)


def first(made):
    """Its last block alone, of one layer."""
    return jax.tree.map(lambda a: a[0], made.segments[0].blocks[-1])


def looks(block, valid=None, segments=None, length: int = S, **fields):
    """(View, RoutingContext) of B rows."""
    positions = jnp.broadcast_to(jnp.arange(length), (B, length))
    flat = lambda a: None if a is None else a.reshape(-1)
    view = View(positions, segments, valid).with_rotary({block.mixer.rotary_key}, jnp.float32)
    return view, RoutingContext(
        batch=B, seq=length, valid=flat(valid), segment_ids=flat(segments), positions=flat(positions), **fields
    )


def by_loop(block, x, chosen, segments):
    """The block a row and a token at a time: (output, scores)."""
    w = {name: np.asarray(a, np.float64) for name, a in P.arrays(block).items()}
    scores, out = np.asarray(x, np.float64) @ w["selector.kernel"], np.array(x, np.float64)
    for b in range(B):
        at = np.flatnonzero(chosen[b])
        h = np.stack([naive.rms_norm(x[b, t], w["mixer_norm.scale"], 1e-6) for t in at])
        sees = lambda _, i, j, b=b, at=at: j <= i and segments[b, at[j]] == segments[b, at[i]]
        mixed = naive.attention(h[None], *(w[f"mixer.{n}"] for n in "qkvo"), sees=sees, positions=at[None], theta=1e4)
        for h, t in zip(mixed[0], at):
            h = h + x[b, t]
            n = naive.rms_norm(h, w["ffn_norm.scale"], 1e-6)
            y = h + naive.ffn(n, *(w[f"ffn.w_{n}"] for n in ("gate", "up", "down")))
            out[b, t] += scores[b, t] * (y - x[b, t])
    return out, scores


def picked(scores, valid, best_of: str = "sequence"):
    """The C best of each row, or the B * C best of the batch."""
    rows = scores.reshape(1, -1) if best_of == "batch" else scores
    chosen, C_row = np.zeros(rows.shape, bool), C * B // len(rows)
    for row, found, real in zip(rows, chosen, valid.reshape(rows.shape), strict=True):
        found[naive.best(list(np.where(real, row, -np.inf)), C_row)] = True
    return chosen.reshape(B, S) & valid


@pytest.mark.parametrize("train, best_of", [(True, "sequence"), (True, "batch"), (False, "sequence")])
def test_output_is_that_of_the_loop_and_others_pass_by_untouched(train, best_of):
    block, x = first(decoder(best_of=best_of)), normal(8, B, S, D)
    valid = np.ones((B, S), bool)
    valid[1, :3] = valid[0, 5] = False
    segments = jnp.asarray(np.where(np.arange(S) < 7, 1, 2) * np.ones((B, 1), int))
    y, aux = call(block, x, *looks(block, jnp.asarray(valid), segments, train=train))
    selection = block.selector(x, None)
    yes = np.asarray(selection.logits > 0) & valid
    chosen = picked(np.asarray(selection.scores), valid, best_of) if train else yes
    expected, scores = by_loop(block, np.asarray(x), chosen, np.asarray(segments))
    np.testing.assert_allclose(selection.scores, scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(y, expected, rtol=2e-3, atol=2e-4)
    np.testing.assert_array_equal(y[~chosen], x[~chosen])
    assert 0 < chosen.sum() < valid.sum() and (not train or chosen.sum() == B * C)
    assert not train or (chosen.sum(1) == C).all() == (best_of == "sequence")
    assert aux.stats["depth_share"].value() == pytest.approx(chosen.sum() / valid.sum())
    if train:
        assert aux.stats["depth_f1"].value() == pytest.approx(2 * (chosen & yes).sum() / (chosen.sum() + yes.sum()))
        block.as_trained = True
        np.testing.assert_array_equal(call(block, x, *looks(block, jnp.asarray(valid), segments))[0], y)


def test_all_tokens_at_weight_one_are_the_block_without_a_selector_to_the_last_bit():
    block, plain, x = first(decoder(name="random_depth", capacity=1.0)), first(decoder("1*dense")), normal(1, B, S, D)
    assert P.arrays(block).keys() == P.arrays(plain).keys()
    for train in (True, False):
        where = looks(block, train=train, key=jax.random.key(0))
        np.testing.assert_array_equal(block(x, *where)[0], plain(x, *where)[0])


def test_a_selector_of_ones_own_in_which_nobody_competes_trains_as_it_reads():
    block, plain, x = first(decoder(name="test_selective:EverySecond")), first(decoder("1*dense")), normal(1, B, S, D)
    y, aux = call(block, x, *looks(block, train=True))
    assert aux.losses["budget"] == 0.5
    even = jnp.broadcast_to(jnp.arange(S) % 2 == 0, (B, S))
    np.testing.assert_array_equal(y[~even], x[~even])
    np.testing.assert_allclose(y[even], call(plain, x, *looks(plain, even))[0][even], atol=1e-6)
    np.testing.assert_array_equal(call(block, x, *looks(block))[0], y)


def test_tokens_that_pass_by_are_seen_by_nobody():
    block, x = first(decoder()), normal(2, B, S, D)
    y = call(block, x, *looks(block, train=True))[0]
    selection = block.selector(x, None)
    chosen = picked(np.asarray(selection.scores), np.ones((B, S), bool))
    # smaller scores than before: the same tokens are chosen
    other = jnp.where(chosen[..., None], x, normal(3, B, S, D) - 9 * block.selector.kernel[...])
    changed = call(block, other, *looks(block, train=True))[0]
    np.testing.assert_array_equal(picked(np.asarray(block.selector(other, None).scores), np.ones((B, S), bool)), chosen)
    np.testing.assert_array_equal(changed[chosen], y[chosen])


def test_padding_is_never_chosen_before_what_is_real_and_changes_nothing():
    scores, valid = normal(4, B, S), jnp.asarray(np.arange(S) % 3 > 0)
    at = best(jnp.where(valid, scores, 99.0), jnp.broadcast_to(valid, (B, S)), C)
    assert valid[at].all() and (jnp.diff(at, axis=1) > 0).all()
    block, few = first(decoder()), jnp.broadcast_to(jnp.arange(S) < C - 2, (B, S))
    x = normal(5, B, S, D)
    y = call(block, x, *looks(block, few, train=True))[0]
    np.testing.assert_array_equal(y[~few], x[~few])
    noise = jnp.where(few[..., None], x, 9 * normal(6, B, S, D))
    np.testing.assert_array_equal(call(block, noise, *looks(block, few, train=True))[0][few], y[few])


@pytest.mark.parametrize("sampling", ["predictor", "aux_loss"])
def test_the_cross_entropy_teaches_the_predictor_alone_or_the_router(sampling):
    made, ids = decoder("1*(dense dense:some)", sampling=sampling), jnp.arange(2 * S).reshape(2, S) % 32
    bce = lambda values: P.replace(made, values)(ids, train=True)[1].losses[f"depth_{sampling}"]
    found = jax.jit(jax.grad(bce))(P.arrays(made))
    reached = {name for name, gradient in found.items() if float(jnp.abs(gradient).max()) > 0}
    own = {name for name in found if ".selector." in name}
    if sampling == "predictor":
        assert reached == {name for name in own if "predict" in name}
    else:  # it moves what is below, too
        assert own < reached and len(own) == 1
    task = lambda values: jnp.sin(P.replace(made, values)(ids, train=True)[0]).sum()
    task = jax.jit(jax.grad(task))(P.arrays(made))
    assert {n for n in own if float(jnp.abs(task[n]).max()) > 0} == {n for n in own if n.endswith("kernel")}


@pytest.mark.parametrize(
    "layers, depth",
    [
        ("1*(dense dense:some)", {"name": "mod"}),
        ("2*(moe moe:some)", {"name": "mod", "sampling": "aux_loss"}),
        ("1*(dense dense:some)", {"name": "random_depth"}),
    ],
)
def test_competing_sees_the_future_and_choosing_does_not_and_decodes_as_it_reads(layers, depth):
    """Around routed blocks the router's memory of the layers below goes with the tokens."""
    made = decoder(layers, **depth)
    ids = np.random.default_rng(0).integers(0, 32, (B, S)).astype(np.int32)
    read = jax.jit(lambda ids: made(ids)[0])
    whole, changed = read(ids), (ids + (np.arange(S) == S - 1)) % 32
    np.testing.assert_allclose(read(changed)[:, :-1], whole[:, :-1], atol=1e-6)
    if depth["name"] == "mod":  # random scores are of places: nobody competes with what a token says
        competing = jax.jit(lambda ids: made.as_trained()(ids)[0])
        assert made.causal and made.selects and not made.as_trained().causal
        futures = [(ids + shift * (np.arange(S) == S - 1)) % 32 for shift in range(1, 32)]
        assert any(np.abs(competing(f) - competing(ids))[:, :-1].max() > 1e-3 for f in futures)
    step = jax.jit(lambda ids, cache: made(ids, cache=cache)[::2])
    for rows, cuts in ((2, [5, 6, 7, 8, 9, 10, 11]), (1, range(1, S))):
        cache, parts = made.init_cache(rows, S + 2), []
        for part in np.split(ids[:rows], cuts, axis=1):
            logits, cache = step(part, cache)
            parts.append(logits)
        np.testing.assert_allclose(np.concatenate(parts, 1), whole[:rows], atol=5e-5)
        kept = cache["segments"][0][1]
        taken = np.asarray(kept["taken"]).sum(-1)
        np.testing.assert_array_equal(np.asarray(kept["block"]["mixer"]["valid"]).sum(-1), taken)
        assert 0 < taken.sum() < taken.size * S


def test_a_full_cache_lets_later_tokens_pass_and_a_short_one_is_short():
    made = decoder("1*(dense dense:some)", cache_factor=0.5)
    ids = np.random.default_rng(1).integers(0, 32, (1, S)).astype(np.int32)
    selector = first(made).selector
    assert selector.places(S) == C // 2 and selector.size(S) == C
    results = []
    for cuts in ([S], [1] * S):
        cache, at, parts = made.init_cache(1, S), 0, []
        step = jax.jit(lambda ids, cache: made(ids, cache=cache)[::2])
        for n in cuts:
            logits, cache = step(ids[:, at : at + n], cache)
            parts.append(logits)
            at += n
        assert cache["segments"][0][1]["block"]["mixer"]["k"].shape[3] == C // 2
        assert cache["segments"][0][1]["taken"].all()
        results.append(np.concatenate(parts, 1))
    np.testing.assert_allclose(*results, atol=2e-5)


def test_one_token_that_is_not_chosen_skips_the_block():
    """Weights that are not numbers go unnoticed in a step that does not run them."""
    made = decoder("1*(dense dense:some)")
    at = "segments.0.blocks.1."
    broken = {n: a * np.nan if n.startswith(f"{at}ffn.") else a for n, a in P.arrays(made).items()}
    made, seen = P.replace(made, broken), []
    step = jax.jit(lambda ids, cache: made(ids, cache=cache)[::2])
    for token in range(12):
        logits, cache = step(jnp.full((1, 1), token), made.init_cache(1, 4))
        seen.append((bool(cache["segments"][0][1]["taken"].any()), bool(jnp.isfinite(logits).all())))
    assert {(True, False), (False, True)} == set(seen)


def test_a_mesh_changes_neither_values_nor_gradients_around_a_routed_block():
    """Staged MoDE, of the batch, behind a dense block of each sequence's best."""
    of = lambda best_of: {"depth": {"name": "mod", "capacity": 0.5, "best_of": best_of}}
    config = tiny_config(layers="1*(dense:row moe:all)", variants={"row": of("sequence"), "all": of("batch")})
    values = P.arrays(P.materialize(Decoder(config), 0))
    ids = np.random.default_rng(0).integers(0, 32, (8, S)).astype(np.int32)
    mixed = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))

    def total(values, ids, mesh):
        logits, aux, _ = P.replace(Decoder(config, mesh), values)(ids, train=True)
        return jnp.sin(logits).sum() + aux.total_loss()

    grad = jax.jit(jax.value_and_grad(total), static_argnums=2)
    one, many = grad(values, ids, None), grad(values, jax.device_put(ids, batch_sharding(mixed)), mixed)
    for expected, found in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


def test_flops_and_parameters_are_those_counted_by_hand():
    plain, some = Decoder(tiny_config(layers="1*dense")), decoder()
    V, F, context, share, hidden = 32, 24, 10, C / S, D // 2
    block = 8 * D * D + 4 * D * share * context + 6 * D * F
    deciding = 2 * D + 2 * D * hidden + 2 * hidden
    assert some.flops_per_token(context) == pytest.approx(share * block + deciding + 2 * D * V)
    own, counts = D + D * hidden + hidden, [count_parameters(m) for m in (plain, some)]
    assert router_parameters(some) == own and counts[1]["total"] == counts[0]["total"] + own
    weights = 4 * D * D + 3 * D * F + 2 * D
    assert counts[1]["active"] == pytest.approx(counts[0]["active"] - weights / 2 + own, abs=8)


def test_what_cannot_be_is_refused_by_name():
    assert set(SELECTORS.names()) == {"dr_llm", "first", "fixed_depth", "ftp", "mod", "none", "random_depth"}
    for changes, words in (
        (dict(layers="2*dense:mud"), "'mud'.*mod"),
        (dict(depth={"name": "mod", "capacity": 1.5}), "depth.capacity: 1.5"),
        (dict(depth={"name": "mod", "cache_factor": 0}), "cache_factor"),
        (dict(layers="2*dense:mod", adapters={"name": "lora"}), "adapters.*depth"),
    ):
        with pytest.raises(ConfigError, match=words):
            tiny_config(**changes)
    with pytest.raises(ConfigError, match="attention_aware.*all of them"):
        Decoder(tiny_config(layers="1*moe:mod", router={"name": "attention_aware"}))
    of_batch = {"name": "mod", "best_of": "batch"}
    for changes, words in (
        (dict(layers="1*dense", mixer="routed_attention"), "mixer 'routed_attention'"),
        (
            dict(layers="1*moe", router={"name": "expert_choice"}, dispatch="slots", losses={}),
            "router.group 'sequence'",
        ),
        (dict(layers="1*moe", dispatch={"name": "capacity", "group": "sequence"}), "dispatch.group"),
        (dict(layers="1*moe", losses={"load_balance": {"over": "sequence"}}), "losses.load_balance"),
    ):
        with pytest.raises(ConfigError, match=f"best_of='batch' shows block.*model.{words}"):
            Decoder(tiny_config(depth=of_batch, **changes))
    block = first(decoder())
    with pytest.raises(ValueError, match="given"):
        block(normal(0, B, S, D), *looks(block, inputs={"given": None}))
