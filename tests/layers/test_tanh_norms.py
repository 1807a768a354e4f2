"""DyT and BHyT: against loops over tokens in float64, what must hold exactly, and within the decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import jitted, normal, tiny_config, tiny_model

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build
from moe_zoo.layers.norm import RMSNorm, make_norm
from moe_zoo.layers.tanh_norm import BHyT, DyT, PredictingBHyT, TanhNormConfig, growth
from moe_zoo.models import Decoder, EncoderDecoderConfig
from moe_zoo.sharding import MeshConfig, make_mesh
from moe_zoo.train.config import load_config
from moe_zoo.train.step import Trainer

B, S, D, N, M, H = 2, 7, 12, 4, 2, 6
EPS = 1e-6
CONFIG = TanhNormConfig(seq_len=32)
W_V, W_O = normal(1, D, M, H, scale=0.4), normal(2, N, H, D, scale=0.4)
POSITIONS = jnp.broadcast_to(jnp.arange(S), (B, S))


def drawn(module):
    """With scales and slopes that are not where they begin."""
    made = P.materialize(module, 0)
    return P.replace(made, {n: a + normal(i, *a.shape, scale=0.3) for i, (n, a) in enumerate(P.arrays(made).items())})


def loop(x, w, lam, kappa, square=None):
    """w tanh(lambda x / (kappa sqrt(s^2 + eps))), number by number."""
    x, out = np.asarray(x, np.float64), np.zeros(x.shape)
    for b, s in np.ndindex(x.shape[:2]):
        found = sum(v * v for v in x[b, s]) / D if square is None else square[b, s]
        for d in range(D):
            out[b, s, d] = float(w[d]) * np.tanh(float(lam) * x[b, s, d] / (kappa * np.sqrt(found + EPS)))
    return out


def growth_by_heads(v, o):
    """||W_V W_O||_F^2 / D with W_V expanded to all query heads, as the paper writes it."""
    v, o = np.asarray(v, np.float64), np.asarray(o, np.float64)
    expanded = np.concatenate([v[:, n // (N // M)] for n in range(N)], axis=1)
    return np.linalg.norm(expanded @ o.reshape(N * H, D), "fro") ** 2 / D


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_they_are_their_formulas_number_by_number(dtype, tolerance):
    x = (normal(0, B, S, D) * 5 + 1).astype(dtype)
    dyt, bhyt = drawn(DyT(D, 0.5)), drawn(BHyT(D, EPS, 2.0, 10.0))
    a, b = jax.jit(lambda x: (dyt(x), bhyt(x)))(x)
    assert a.dtype == b.dtype == dtype
    w, bias, alpha = (np.asarray(p[...], np.float64) for p in (dyt.scale, dyt.bias, dyt.alpha))
    np.testing.assert_allclose(
        np.asarray(a, np.float64), w * np.tanh(alpha * np.asarray(x, np.float64)) + bias, rtol=tolerance, atol=tolerance
    )
    expected = loop(np.asarray(x, np.float64), bhyt.scale[...], bhyt.slope[...], 10.0)
    np.testing.assert_allclose(np.asarray(b, np.float64), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", ["seq_len", "position"])
def test_the_second_statistic_is_predicted_from_the_first(tokens):
    x, config = normal(3, B, S, D) * 3, dataclasses.replace(CONFIG, tokens=tokens, kappa=3.0)
    first, second = drawn(BHyT(D, EPS, 2.0, 3.0)), drawn(PredictingBHyT(D, EPS, config, 1.0))
    second.growth[...] = growth(W_V, W_O)
    assert float(second.growth[...]) == pytest.approx(growth_by_heads(W_V, W_O), rel=1e-5)
    square, predicted = second.squares(x, POSITIONS, first)
    lam = float(first.slope[...])
    c = lambda s: growth_by_heads(W_V, W_O) / (32 if tokens == "seq_len" else s + 1)
    measured = (np.asarray(x, np.float64) ** 2).mean(-1)
    expected = [[measured[b, s] + c(s) * lam**2 / 3.0**2 for s in range(S)] for b in range(B)]
    np.testing.assert_allclose(square[..., 0], measured, rtol=1e-5)
    np.testing.assert_allclose(predicted[..., 0], expected, rtol=1e-5)
    h = normal(4, B, S, D)
    expected = loop(h, second.scale[...], second.slope[...], 3.0, np.asarray(predicted[..., 0], np.float64))
    np.testing.assert_allclose(second(h, predicted), expected, rtol=1e-5, atol=1e-6)
    # without what attention adds the prediction is exact, bit by bit
    second.growth[...] = growth(W_V, 0 * W_O)
    np.testing.assert_array_equal(*second.squares(x, POSITIONS, first))


def test_attention_spread_evenly_adds_what_is_predicted():
    """The claim behind c: n independent tokens of BHyT's output, averaged and put through W_V W_O."""
    rng, n, slope, kappa = np.random.default_rng(0), 16, 1.0, 10.0
    first = P.materialize(BHyT(D, EPS, slope, kappa), 0)
    x = jnp.asarray(rng.standard_normal((4000, n, D)), jnp.float32)
    both = np.einsum("dmh,mhe->de", W_V, np.asarray(W_O).reshape(M, N // M, H, D).sum(1))
    added = np.asarray(first(x)).mean(1) @ both
    assert (added**2).mean() == pytest.approx(growth_by_heads(W_V, W_O) / n * (slope / kappa) ** 2, rel=0.05)


def test_no_number_reaches_the_gain_whatever_the_input():
    bhyt, dyt = drawn(BHyT(D, EPS, 3.0, 10.0)), drawn(DyT(D, 0.8, bias=False))
    for scale in (0.0, 1e-12, 1.0, 1e18):
        x = normal(5, B, S, D) * scale
        assert (np.abs(bhyt(x)) < np.abs(bhyt.scale[...])).all() and np.isfinite(dyt(x)).all()
        assert (np.abs(dyt(x)) <= np.abs(dyt.scale[...])).all()
    lone = jnp.zeros((1, 1, D)).at[..., 3].set(7.0)  # all in one channel: sqrt(D) root mean squares away
    assert (np.abs(bhyt(lone)) < np.abs(bhyt.scale[...])).all()


def test_a_small_slope_is_rmsnorm_up_to_a_constant_and_scale_does_not_matter():
    x = normal(6, B, S, D) * 4
    small, rms = P.materialize(BHyT(D, EPS, 1e-3, 10.0), 0), P.materialize(RMSNorm(D, EPS), 0)
    np.testing.assert_allclose(np.asarray(small(x)) * 10.0 / 1e-3, rms(x), rtol=1e-5, atol=1e-6)
    bhyt, dyt = drawn(BHyT(D, EPS, 2.0, 10.0)), drawn(DyT(D, 0.5))
    np.testing.assert_allclose(bhyt(x * 37.0), bhyt(x), rtol=1e-5, atol=1e-6)
    assert np.abs(dyt(x * 37.0) - dyt(x)).max() > 0.1


def test_gradients_go_through_the_statistic_and_not_through_what_is_predicted_on_top():
    x, h, config = normal(7, B, S, D), normal(8, B, S, D), dataclasses.replace(CONFIG, seq_len=1)
    first, second = drawn(BHyT(D, EPS, 2.0, 10.0)), drawn(PredictingBHyT(D, EPS, config, 3.0))

    def loss(first, second, x, h):
        return second(h, second.squares(x, POSITIONS, first)[1]).sum()

    of_first, of_second, dx, dh = jax.grad(loss, argnums=(0, 1, 2, 3), allow_int=True)(first, second, x, h)
    assert not np.any(of_first.slope[...]) and not np.any(of_second.growth[...])
    assert np.abs(of_second.slope[...]) > 0 and np.abs(of_second.scale[...]).min() > 0
    assert np.abs(dx).max(-1).min() > 0 and np.abs(dh).max(-1).min() > 0
    # by differences, through s^2
    step = normal(9, B, S, D) * 1e-2
    there, back = (float(loss(first, second, x + sign * step, h)) for sign in (1, -1))
    assert (there - back) / 2 == pytest.approx(float(jnp.vdot(dx, step)), rel=2e-2, abs=1e-5)


def test_zero_in_place_of_the_last_slope_is_rmsnorm():
    last = lambda **changes: make_norm("bhyt", D, EPS, "last", TanhNormConfig(**changes))
    assert isinstance(last(), RMSNorm) and isinstance(last(lambda_last=2.0), BHyT)
    assert isinstance(make_norm("bhyt_star", D, EPS, "ffn", CONFIG, 1.0), BHyT)
    assert not isinstance(make_norm("bhyt_star", D, EPS, "ffn", CONFIG, 1.0), PredictingBHyT)


# --- in the decoder ---------------------------------------------------------------------------------------------------

SETTINGS = {
    "layers": "2*dense", "norm": "bhyt", "tanh_norm": {"seq_len": 1, "lambda_last": 2.0, "tokens": "position"},
    "attention": {"num_attention_heads": 2, "num_key_value_heads": 1},
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 6))


@pytest.fixture(scope="module")
def model():
    return tiny_model(**SETTINGS)


def test_a_block_measures_once_and_divides_the_second_time_by_what_it_predicts(model):
    """Layer by layer with mean squares taken by hand; attention and the network are the model's own."""
    from moe_zoo.layers.attention import View

    found, _, _ = jitted(model, lambda m, t: m(t))(jnp.asarray(TOKENS, jnp.int32))
    positions = jnp.broadcast_to(jnp.arange(6), TOKENS.shape)
    x = model.embed(jnp.asarray(TOKENS), jnp.float32)
    (segment,) = model.segments
    exact = []
    for layer in range(2):
        block = jax.tree.map(lambda a, layer=layer: a[layer], segment.blocks[0])
        view = View(positions).with_rotary([block.mixer.rotary_key], jnp.float32)
        s2 = np.asarray((x**2).mean(-1, keepdims=True))
        one, two = block.mixer_norm, block.ffn_norm
        u = one.scale[...] * np.tanh(one.slope[...] * x / (10 * np.sqrt(s2 + model.config.norm_eps)))
        h = x + block.mixer(u, view)[0]
        more = float(two.growth[...]) * (float(one.slope[...]) / 10) ** 2 / (positions[..., None] + 1)
        exact.append(np.abs((h**2).mean(-1, keepdims=True) - s2 - more).max())
        u = two.scale[...] * np.tanh(two.slope[...] * h / (10 * np.sqrt(s2 + more + model.config.norm_eps)))
        x = h + block.ffn(u)
    np.testing.assert_allclose(found, model.head(model.norm(x)), rtol=1e-4, atol=1e-5)
    assert min(exact) > 1e-6  # it is no measurement


def test_padding_on_the_left_changes_nothing_and_cached_decoding_is_the_parallel_form(model):
    whole = jitted(model, lambda m, t, valid: m(t, valid=valid)[0])
    ids = np.concatenate([np.full((2, 2), 9), TOKENS], 1)
    both = np.stack([np.arange(8) >= 2, np.arange(8) < 6])
    ids[1] = np.concatenate([TOKENS[0], [9, 9]])
    ids[0, 2:] = TOKENS[0]
    padded = whole(jnp.asarray(ids, jnp.int32), jnp.asarray(both))
    np.testing.assert_allclose(padded[0, 2:], padded[1, :6], rtol=1e-4, atol=1e-5)
    step = jitted(model, lambda m, t, cache: m(t, cache=cache)[::2])
    cache = model.init_cache(2, 8)
    for at in range(6):
        logits, cache = step(jnp.asarray(np.stack([TOKENS[0], TOKENS[0]])[:, at : at + 1], jnp.int32), cache)
        np.testing.assert_allclose(logits[:, 0], np.stack([padded[0, 2 + at], padded[1, at]]), rtol=1e-4, atol=1e-5)


def test_growth_follows_the_weights_when_it_is_its_turn_on_a_mesh_too():
    """From the first weights on. Heads lie on different devices: norms of shards would miss their cross terms."""
    config = load_config(
        "bhyt:tiny", [("model.tanh_norm.refresh_every", "2"), ("model.layers", "2*dense"), ("optim.warmup_steps", "0")]
    )
    mesh = lambda **axes: make_mesh(MeshConfig(**axes), devices=jax.devices()[: int(np.prod(list(axes.values())))])
    rng = np.random.default_rng(0)
    rows = config.data.batch_size, config.data.seq_len
    batch = {
        "tokens": rng.integers(0, 256, rows).astype(np.int32), "targets": rng.integers(0, 256, rows).astype(np.int32),
        "segment_ids": np.ones(rows, np.int32), "positions": np.tile(np.arange(rows[1], dtype=np.int32), (rows[0], 1)),
        "domain": np.zeros(rows, np.int32), "loss_mask": np.ones(rows, bool),
    }  # fmt: skip
    path = "segments.0.blocks.0"
    runs = []
    for where in (mesh(data=1), mesh(data=2, fsdp=2, tensor=2)):
        trainer = Trainer(config, where, config.train.objective.make())
        state, told = trainer.init_state(), []

        def now(state=state):
            v, o = (np.asarray(state["trainable"][f"{path}.mixer.{name}"]) for name in "vo")
            return [growth(v[i], o[i]) for i in range(2)]

        np.testing.assert_allclose(state["buffers"][f"{path}.ffn_norm.growth"], now(), rtol=1e-5)
        for step in range(3):
            before = np.asarray(state["buffers"][f"{path}.ffn_norm.growth"])
            state, stats = trainer.train_step(state, batch, np.float32(0))
            told.append(float(stats["scalars"]["loss"]))
            expected = now(state) if step % 2 == 0 else before
            np.testing.assert_allclose(state["buffers"][f"{path}.ffn_norm.growth"], expected, rtol=1e-5)
        assert np.abs(before - expected).min() > 1e-5
        norms = jax.device_get(stats["gradient_norms"])
        assert all(
            np.all(np.asarray(norms[f"{path}.{n}.{p}"]) > 0)
            for n in ("mixer_norm", "ffn_norm")
            for p in ("slope", "scale")
        )
        runs.append((told, jax.device_get(norms), jax.device_get(state["buffers"])))
    (one, slopes, grown), (many, slopes_too, grown_too) = runs
    np.testing.assert_allclose(many, one, rtol=1e-4)
    for name, value in slopes.items():
        np.testing.assert_allclose(slopes_too[name], value, rtol=5e-3, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(grown_too[f"{path}.ffn_norm.growth"], grown[f"{path}.ffn_norm.growth"], rtol=1e-3)


def test_growth_begins_at_what_it_is_on_average_for_weights_as_drawn():
    made = P.materialize(Decoder(tiny_config(hidden_size=64, layers="2*dense", norm="bhyt")), 0)
    block = made.segments[0].blocks[0]
    at_first = np.asarray(block.ffn_norm.growth[...])
    found = jax.vmap(growth)(block.mixer.v[...], block.mixer.o[...])
    np.testing.assert_allclose(found, at_first, rtol=0.2)


@pytest.mark.parametrize("changes, words", [
    ({"norm": "bhytt"}, ["model.norm", "'bhytt'", "did you mean 'bhyt'"]),
    ({"norm": "dty"}, ["model.norm", "did you mean 'dyt'"]),
    ({"tanh_norm": {"kapa": 3.0}}, ["model.tanh_norm.kapa", "did you mean 'kappa'"]),
    ({"tanh_norm": {"kappa": 0.0}}, ["model.tanh_norm.kappa", "> 0"]),
    ({"norm": "bhyt", "norm_placement": "post"}, ["model.norm_placement", "'pre' only", "bhyt_star"]),
    ({"norm": "bhyt", "residual_multiplier": 0.5}, ["model.residual_multiplier", "bhyt_star"]),
    ({"norm": "bhyt", "layers": "moe moe:mamba2"}, ["'mamba2'", "bhyt_star"]),
    ({"norm": "bhyt", "attention": {"num_attention_heads": 2, "sinks": True}}, ["attention.sinks", "bhyt_star"]),
    ({"layers": "moe:x", "variants": {"x": {"embedding_scale": 2.0}}}, ["embedding_scale", "whole model"]),
])  # fmt: skip
def test_what_cannot_be_is_said_by_name(changes, words):
    with pytest.raises(ConfigError) as error:
        tiny_config(**changes)
    assert all(word in str(error.value) for word in words), error.value
    with pytest.raises(ConfigError, match="bhyt_star"):
        build(
            EncoderDecoderConfig,
            {"norm": "bhyt", "attention": {"rotary_dim": 0}, "encoder": {"layers": "dense"}},
            "model",
        )


def test_layers_may_differ_and_a_lone_branch_measures():
    model = Decoder(
        tiny_config(layers="moe:exact moe dense:none mixer", norm="bhyt", variants={"exact": {"norm": "bhyt_star"}})
    )
    kinds = [block.predicts for _, block, _ in model.blocks()]
    assert kinds == [False, True, False, False]
    shortcut = tiny_model(layers="shortcut", norm="bhyt").refreshed(jnp.int32(0))
    assert {name.split("blocks.0.")[1] for name in shortcut} == {"ffn_norm.growth", "second.ffn_norm.growth"}


def test_dyt_has_a_learned_factor_on_its_embeddings():
    model = tiny_model(layers="dense", norm="dyt_no_bias", embedding_scale=4.0)
    ids = jnp.asarray(TOKENS)
    np.testing.assert_allclose(
        model.embed(ids, jnp.float32),
        float(model.embed.scale[...]) * np.asarray(model.embed.table[...])[TOKENS],
        rtol=1e-6,
    )
    names = set(P.arrays(model))
    assert "norm.alpha" in names and "norm.bias" not in names and "segments.0.blocks.0.ffn_norm.alpha" in names
    assert "segments.0.blocks.0.ffn_norm.bias" in set(P.arrays(Decoder(tiny_config(layers="dense", norm="dyt"))))
