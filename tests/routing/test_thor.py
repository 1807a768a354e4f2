"""THOR's draws: who shares one, what they depend on, how often each expert comes, and decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import tiny_model

from moe_zoo.core.context import RoutingContext
from moe_zoo.routing.router import Dims
from moe_zoo.routing.thor import Thor, ThorConfig

B, S, E = 4, 12, 5
SEGMENTS = np.where(np.arange(S) < np.array([[3], [12], [6], [1]]), 1, 2)
POSITIONS = np.where(SEGMENTS == 1, np.arange(S), np.arange(S) - (SEGMENTS == 1).sum(1, keepdims=True))
X = jnp.zeros((B * S, 2))

experts_of = jax.jit(lambda router, ctx: router(X[: ctx.batch * ctx.seq], ctx).decision.experts[:, 0])


def context(**changes) -> RoutingContext:
    fields = dict(train=True, key=jax.random.key(0), layer=jnp.int32(0))
    fields |= {"segment_ids": jnp.asarray(SEGMENTS.reshape(-1)), "positions": jnp.asarray(POSITIONS.reshape(-1))}
    return RoutingContext(batch=B, seq=S, **{**fields, **changes})


def router(num_experts=E, **settings) -> Thor:
    return Thor(ThorConfig(**settings), Dims(num_experts, 2))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("granularity", ["batch", "sequence", "token"])
def test_tokens_share_a_draw_as_the_granularity_says(granularity, train):
    """Equal within the batch, a document, a token; over many keys different between any two of those."""
    name = "granularity" if train else "eval_granularity"
    made, keys = router(**{name: granularity}), jax.random.split(jax.random.key(1), 60)
    drawn_KT = np.asarray(jax.vmap(lambda key: experts_of(made, context(key=key, train=train)))(keys))
    owner = {
        "batch": np.zeros(B * S),
        "sequence": (np.arange(B * S) // S) * 10 + SEGMENTS.reshape(-1),
        "token": np.arange(B * S),
    }[granularity]
    together_TT = (drawn_KT[:, :, None] == drawn_KT[:, None, :]).all(0)
    np.testing.assert_array_equal(together_TT, owner[:, None] == owner[None, :])


@pytest.mark.parametrize("granularity", ["batch", "token"])
def test_every_expert_is_drawn_equally_often(granularity):
    """Against a chi-squared bound that a right draw exceeds once in 1e5 times; independent draws of two passes."""
    made, N = router(granularity=granularity), 2000
    first, second = (
        np.asarray(jax.vmap(lambda k: experts_of(made, context(key=k))[0])(jax.random.split(jax.random.key(s), N)))
        for s in (0, 1)
    )
    assert set(first) == set(range(E))
    pairs = np.bincount(first * E + second, minlength=E * E)
    assert ((pairs - N / E**2) ** 2 / (N / E**2)).sum() < 70  # 24 degrees of freedom
    loads = np.bincount(first, minlength=E)
    assert ((loads - N / E) ** 2 / (N / E)).sum() < 29  # 4


def test_gates_are_one_nothing_is_learned_and_nothing_of_x_is_read():
    made = router()
    routing = made(jnp.full((B * S, 2), jnp.nan), context())
    np.testing.assert_array_equal(routing.decision.gates, 1)
    assert routing.logits is None and routing.probs is None and made.flops_per_token(64) == 0 and made.active() == 1


def test_training_without_a_key_is_refused():
    with pytest.raises(ValueError, match="'thor' draws experts: training needs a key"):
        router()(X, context(key=None))


def test_draws_at_inference_follow_from_the_seed_the_layer_and_the_key():
    ctx = context(train=False, key=None)
    made = router(64, eval_granularity="token")
    drawn = lambda **changes: np.asarray(experts_of(changes.pop("made", made), dataclasses.replace(ctx, **changes)))
    base = drawn()
    np.testing.assert_array_equal(base, drawn())
    others = (
        drawn(made=router(64, eval_granularity="token", eval_seed=1)),
        drawn(layer=jnp.int32(1)),
        drawn(key=jax.random.key(9)),
    )
    keyed = drawn(key=jax.random.key(9), made=router(64, eval_granularity="token", eval_seed=1))
    assert (keyed != others[-1]).mean() > 0.8
    for other in others:
        assert (base != other).mean() > 0.8
    # a row that is not packed is a row of one document, whoever says so
    np.testing.assert_array_equal(
        drawn(segment_ids=None, positions=None),
        drawn(segment_ids=jnp.ones(B * S, jnp.int32), positions=jnp.tile(jnp.arange(S), B)),
    )


@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_decoding_behind_padding_has_the_draws_of_the_text_alone(granularity):
    """A prompt padded on the left, then token by token with a cache, equals one pass over the text without padding."""
    model = tiny_model(
        layers="1*moe", num_experts=8, losses={}, router={"name": "thor", "eval_granularity": granularity}
    )
    ids, pad = np.random.default_rng(0).integers(0, 32, (2, 7)).astype(np.int32), 3
    whole = jax.jit(lambda t: model(t)[0])(ids)
    tokens = np.pad(ids[:, :4], ((0, 0), (pad, 0)))
    valid = np.arange(pad + 4) >= pad
    positions = np.maximum(np.arange(pad + 4) - pad, 0)
    rows = lambda x: jnp.asarray(np.tile(x, (2, 1)))
    step = jax.jit(lambda t, cache, **more: model(t, cache=cache, **more)[::2])
    logits, cache = step(tokens, model.init_cache(2, 16), positions=rows(positions), valid=rows(valid))
    np.testing.assert_allclose(logits[:, pad:], whole[:, :4], atol=2e-5)
    for at in range(4, 7):
        logits, cache = step(ids[:, at : at + 1], cache, positions=rows([at]))
        np.testing.assert_allclose(logits[:, 0], whole[:, at], atol=2e-5)
