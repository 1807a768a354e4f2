"""Settings that released models need: each against its formula, and off it changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from naive import normal, tiny_config, tiny_model

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.experts.feed_forward import FeedForward
from moe_zoo.layers.attend import attend
from moe_zoo.layers.attention import Attention, AttentionConfig, View
from moe_zoo.layers.mlp import MLP, FeedForwardConfig
from moe_zoo.layers.rope import RopeScaling, angles, rotate
from moe_zoo.models import Decoder

IDS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 7)))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def turned(x, positions, size, scaling, interleaved):
    return rotate(x, angles(positions, size, 50.0, scaling), interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_what_is_beyond_the_rotated_part_of_a_head_stays(interleaved):
    x, positions = normal(0, 1, 2, 5, 8), jnp.arange(5)[None] * 3
    out = np.asarray(turned(x, positions, 4, RopeScaling(), interleaved))
    np.testing.assert_array_equal(out[..., 4:], x[..., 4:])
    # pairs (2i, 2i + 1) are pairs (i, i + h) of the reordered head
    order = [0, 2, 1, 3] if interleaved else [0, 1, 2, 3]
    part = np.asarray(x[..., :4])[..., order]
    for s in range(5):
        expected = np.stack([naive.rope(part[0, n, s], 3 * s, 50.0) for n in range(2)])
        np.testing.assert_allclose(out[0, :, s, :4][..., order], expected, rtol=1e-4, atol=1e-5)


def test_stretches_divide_low_frequencies_and_keep_high_ones():
    plain = RopeScaling().frequencies(16, 1e4)
    common = dict(factor=4.0, original_max_position_embeddings=64)
    np.testing.assert_allclose(RopeScaling("linear", factor=4.0).frequencies(16, 1e4), plain / 4)
    for scaling in (RopeScaling("llama3", **common), RopeScaling("yarn", **common)):
        ratio = scaling.frequencies(16, 1e4) / plain
        assert ratio[0] == 1 and ratio[-1] == pytest.approx(0.25) and (np.diff(ratio) <= 1e-12).all()
    long = RopeScaling("longrope", short_factor=(1.0, 2.0), long_factor=(4.0, 8.0), original_max_position_embeddings=9,
                       attention_factor=1.5, long_attention_factor=2.0)  # fmt: skip
    for last, factor, size in ((8, (1.0, 2.0), 1.5), (9, (4.0, 8.0), 2.0)):
        sin, _ = angles(jnp.array([[0, last]]), 4, 100.0, long)
        angle = last * 100.0 ** -np.array([0, 0.5]) / np.array(factor)
        np.testing.assert_allclose(sin[0, 0, 1], size * np.sin(angle), rtol=1e-4, atol=1e-5)


def test_biases_of_attention_are_added_where_they_belong():
    config = AttentionConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=4, qkv_bias=True, output_bias=True)
    made = P.materialize(Attention(config, hidden_size=8, out_scale=1.0), 0)
    values = P.arrays(made)
    assert {n for n in values if "bias" in n} == {"q_bias", "k_bias", "v_bias", "o_bias"}
    assert not any(np.any(values[n]) for n in values if "bias" in n)
    biases = {n: normal(i, *a.shape) for i, (n, a) in enumerate(values.items()) if "bias" in n}
    made = P.replace(made, values | biases)
    # a constant input of 1 with the bias as its row of weights says the same
    plain = P.materialize(
        Attention(dataclasses.replace(config, qkv_bias=False, output_bias=False), hidden_size=9, out_scale=1.0), 0
    )
    wide = {n: jnp.concatenate([values[n], biases[f"{n}_bias"].reshape(1, *values[n].shape[1:])]) for n in "qkv"}
    wide["o"] = jnp.pad(values["o"], ((0, 0), (0, 0), (0, 1)))
    plain, x = P.replace(plain, wide), normal(9, 1, 6, 8)
    run = jax.jit(lambda m, x: m(x, View(jnp.arange(6)[None]).with_rotary({m.rotary_key}, x.dtype))[0])
    expected = run(plain, jnp.concatenate([x, jnp.ones((1, 6, 1))], -1))[..., :8] + biases["o_bias"]
    np.testing.assert_allclose(run(made, x), expected, rtol=1e-4, atol=1e-5)


def with_biases(made):
    values = P.arrays(made)
    return P.replace(made, {n: normal(i, *a.shape, scale=0.7) for i, (n, a) in enumerate(values.items())})


def test_chunks_gates_clips_and_norms_behind_the_rotation():
    config = AttentionConfig(
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, chunk_size=3, qk_norm="unscaled",
        qk_norm_after_rope=True, clip_qkv=0.7, output_gate=True, rope_theta=50.0, temperature_scale=0.8,
        temperature_floor=2,
    )  # fmt: skip
    config.validate("attention")
    x, positions = normal(9, 1, 7, 8), np.arange(2, 9)
    run = jax.jit(lambda m, x, p, *at: m(x, View(p).with_rotary({m.rotary_key}, x.dtype), *at))
    for rotary in (None, 0):
        made = P.materialize(Attention(dataclasses.replace(config, rotary_dim=rotary), hidden_size=8, out_scale=1.0), 0)
        assert (made.rotary_key is None) == (rotary == 0)
        whole = np.asarray(run(made, x, jnp.asarray(positions)[None])[0])
        w, X = {n: np.asarray(a, np.float64) for n, a in P.arrays(made).items()}, np.asarray(x[0], np.float64)
        turn = lambda v, p, rotary=rotary: v if rotary == 0 else naive.rope(v, p, 50.0)
        q, k, v = (np.clip(np.einsum("sd,dnh->snh", X, w[n]), -0.7, 0.7) for n in "qkv")
        assert max(np.abs(q).max(), np.abs(k).max()) == 0.7
        gate = naive.sigmoid(np.einsum("sd,dnh->snh", X, w["gate"]))
        for i, p in enumerate(positions):
            heads = []
            for n in range(4):
                mine = naive.rms_norm(turn(q[i, n], p), 1, 1e-6) * (1 + 0.8 * np.log(1 + (p + 1) // 2))
                seen = [j for j in range(i + 1) if positions[j] // 3 == p // 3]
                keys = [naive.rms_norm(turn(k[j, n // 2], positions[j]), 1, 1e-6) for j in seen]
                weights = naive.softmax(np.array([mine @ key / 2 for key in keys]))
                heads.append(gate[i, n] * (weights @ v[seen, n // 2]))
            np.testing.assert_allclose(whole[0, i], np.einsum("nh,nhd->d", heads, w["o"]), rtol=2e-3, atol=1e-5)
    cache, pieces = made.init_cache(1, 8, jnp.float32), []
    for start, stop in ((0, 5), (5, 7)):
        out, cache = run(made, x[:, start:stop], jnp.asarray(positions)[None, start:stop], cache, jnp.int32(start))
        pieces.append(out)
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    assert made.flops_per_token(9.0) == made.flops_per_token(2.0)


@pytest.mark.parametrize("gated", [True, False])
def test_biases_of_feed_forward_networks_and_of_banks(gated):
    config = FeedForwardConfig(gated=gated, bias=True)
    mlp = with_biases(P.materialize(MLP(config, hidden_size=5, intermediate_size=7, out_scale=1.0), 0))
    bank = with_biases(
        P.materialize(FeedForward(config, num_experts=3, hidden_size=5, intermediate_size=7, out_scale=1.0), 0)
    )
    x, sizes = normal(1, 10, 5), jnp.array([4, 0, 3])
    rows = np.asarray(jax.jit(lambda b, x: b._general_rows(x, sizes))(bank, x))
    batched = np.asarray(jax.jit(lambda b, x: b.batched(x))(bank, jnp.broadcast_to(x, (3, 10, 5))))
    one = lambda w, x: np.asarray(P.replace(mlp, w)(x))
    for e, where in ((0, slice(0, 4)), (2, slice(4, 7))):
        mine = {n: a[e] for n, a in P.arrays(bank).items()}
        np.testing.assert_allclose(rows[where], one(mine, x[where]), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(batched[e], one(mine, x), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(rows[7:], 0)
    w = {n: np.asarray(a, np.float64) for n, a in P.arrays(mlp).items()}
    up = np.asarray(x, np.float64) @ w["w_up"] + w["b_up"]
    inner = naive.silu(np.asarray(x) @ w["w_gate"] + w["b_gate"]) * up if gated else naive.silu(up)
    np.testing.assert_allclose(np.asarray(mlp(x)), inner @ w["w_down"] + w["b_down"], rtol=1e-4)


def test_limits_and_shift_of_the_gated_unit():
    config = FeedForwardConfig(activation="quick_gelu", clamp=0.5, up_shift=1.0)
    made, x = P.materialize(MLP(config, hidden_size=5, intermediate_size=7, out_scale=1.0), 0), normal(3, 9, 5)
    w = {n: np.asarray(a, np.float64) for n, a in P.arrays(made).items()}
    gate, up = np.minimum(np.asarray(x) @ w["w_gate"], 0.5), np.clip(np.asarray(x) @ w["w_up"], -0.5, 0.5)
    np.testing.assert_allclose(made(x), (gate * naive.sigmoid(1.702 * gate) * (up + 1)) @ w["w_down"], rtol=1e-4)


def test_a_third_factor_of_feed_forward_networks_and_of_banks():
    """OpenMoE's: act(x W_gate) * (x W_up) * (x W_linear) W_down."""
    config, sizes = FeedForwardConfig(linear_factor=True), dict(hidden_size=5, intermediate_size=7, out_scale=1.0)
    mlp, bank = P.materialize(MLP(config, **sizes), 0), P.materialize(FeedForward(config, num_experts=3, **sizes), 0)
    x, counts = normal(1, 10, 5), jnp.array([4, 0, 3])

    def formula(w, x):
        gate, up, linear = (x @ np.asarray(w[f"w_{name}"], np.float64) for name in ("gate", "up", "linear"))
        return naive.silu(gate) * up * linear @ w["w_down"]

    np.testing.assert_allclose(mlp(x), formula(P.arrays(mlp), x), rtol=1e-4, atol=1e-5)
    rows = np.asarray(jax.jit(lambda b, x: b._general_rows(x, counts))(bank, x))
    batched = np.asarray(jax.jit(lambda b, x: b.batched(x))(bank, jnp.broadcast_to(x, (3, 10, 5))))
    for e, where in ((0, slice(0, 4)), (2, slice(4, 7))):
        mine = {n: a[e] for n, a in P.arrays(bank).items()}
        np.testing.assert_allclose(rows[where], formula(mine, x[where]), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(batched[e], formula(mine, x), rtol=1e-4, atol=1e-5)
    grads = jax.jit(jax.grad(lambda w, x: P.replace(bank, w)._general_rows(x, counts).sum()))(P.arrays(bank), x)
    reached = np.abs(grads["w_linear"]).sum((1, 2))
    assert (reached[[0, 2]] > 0).all() and reached[1] == 0
    assert mlp.flops_per_token() == 2 * 4 * 5 * 7 and bank.flops_per_row() == mlp.flops_per_token()
    narrow = FeedForward(config, num_experts=3, **sizes)
    narrow.quantize()
    assert P.arrays(narrow)["w_linear"].dtype == jnp.int8 and P.arrays(narrow)["w_linear_scale"].shape == (3, 1, 7)


def test_a_mixture_of_adapters_keeps_the_third_factor():
    adapters = {"name": "mixlora", "num_experts": 2, "target_modules": ["ffn.*"]}
    same = dict(layers="1*dense", mlp={"linear_factor": True})
    plain, beside = tiny_model(**same), tiny_model(**same, adapters=adapters)
    new = {n: a for n, a in P.arrays(beside).items() if ".adapters." in n}
    beside = P.replace(beside, {**P.arrays(plain), **new})
    # B begins at zero
    np.testing.assert_allclose(beside(IDS)[0], plain(IDS)[0], rtol=1e-4, atol=1e-5)


def test_a_sink_takes_weight_and_adds_nothing():
    q, k, v, sinks = normal(0, 1, 4, 3, 8), normal(1, 1, 2, 3, 8), normal(2, 1, 2, 3, 8), normal(3, 4)
    mask = jnp.tril(jnp.ones((1, 3, 3), bool))
    out = np.asarray(attend(q, k, v, mask, None, sinks))
    for n in range(4):
        for i in range(3):
            scores = [float(q[0, n, i] @ k[0, n // 2, j]) / 8**0.5 for j in range(i + 1)]
            weights = naive.softmax(np.array([*scores, float(sinks[n])]))[:-1]
            np.testing.assert_allclose(out[0, n, i], weights @ np.asarray(v[0, n // 2, : i + 1]), rtol=1e-4, atol=1e-6)


def test_multipliers_and_placement_of_norms():
    scale = dict(embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=4.0)
    whole, plain = tiny_model(layers="1*dense", **scale), tiny_model(layers="1*dense")
    weights = P.arrays(plain)
    folded = weights | {
        "embed.table": weights["embed.table"] * 3,
        "head.kernel": weights["head.kernel"] / 4,
        "segments.0.blocks.0.mixer.o": weights["segments.0.blocks.0.mixer.o"] / 2,
        "segments.0.blocks.0.ffn.w_down": weights["segments.0.blocks.0.ffn.w_down"] / 2,
    }
    np.testing.assert_allclose(whole(IDS)[0], P.replace(plain, folded)(IDS)[0], rtol=1e-4, atol=1e-5)
    post = tiny_model(layers="1*dense", norm_placement="post")
    block = jax.tree.map(lambda a: a[0], post.segments[0].blocks[0])
    x = post.embed(IDS, jnp.float32)
    view = View(jnp.broadcast_to(jnp.arange(7), (2, 7))).with_rotary({block.mixer.rotary_key}, jnp.float32)
    x = x + block.mixer_norm(block.mixer(x, view)[0])
    x = x + block.ffn_norm(block.ffn(x))
    np.testing.assert_allclose(post(IDS)[0], post.head(post.norm(x)), rtol=1e-4, atol=1e-5)
    both = tiny_model(layers="1*dense", norm_placement="both", norm="layer_no_bias")
    both = P.replace(both, {n: normal(i, *a.shape, scale=0.5) for i, (n, a) in enumerate(P.arrays(both).items())})
    block = jax.tree.map(lambda a: a[0], both.segments[0].blocks[0])
    assert not any("bias" in name for name in P.arrays(both))
    x = both.embed(IDS, jnp.float32)
    x = x + block.mixer_post_norm(block.mixer(block.mixer_norm(x), view)[0])
    x = x + block.ffn_post_norm(block.ffn(block.ffn_norm(x)))
    np.testing.assert_allclose(both(IDS)[0], both.head(both.norm(x)), rtol=1e-4, atol=1e-5)


def test_the_head_may_have_a_bias():
    made = tiny_model(layers="1*dense", lm_head_bias=True)
    bias = normal(0, 32)
    shifted = P.replace(made, P.arrays(made) | {"head.bias": bias})
    np.testing.assert_allclose(shifted(IDS)[0], made(IDS)[0] + bias, rtol=1e-5, atol=1e-6)


def test_defaults_add_no_parameter():
    names = {n.rsplit(".", 1)[1] for n in P.flat(Decoder(tiny_config(layers="dense moe")))}
    assert names == {"table", "kernel", "scale", "q", "k", "v", "o", "w_gate", "w_up", "w_down"}


@pytest.mark.parametrize("setting", ["bias", "linear_factor"])
def test_biases_are_added_once_and_factors_multiplied_on_a_mesh(setting):
    from moe_zoo.sharding import MeshConfig, make_mesh, sharding_of

    changes = dict(layers="1*moe", experts={"name": "feed_forward", setting: True})
    one = with_biases(tiny_model(**changes))
    mesh = make_mesh(MeshConfig(expert=2, tensor=2), jax.devices()[:8])
    many = Decoder(tiny_config(**changes), mesh)
    place = lambda n, v: jax.device_put(P.arrays(one)[n], sharding_of(mesh, v.logical_axes, v.get_value().shape, n))
    many = P.replace(many, {n: place(n, v) for n, v in P.flat(many).items()})
    ids = jnp.concatenate([IDS] * 4)
    np.testing.assert_allclose(jax.jit(lambda m, i: m(i)[0])(many, ids), one(ids)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(attention={"num_attention_heads": 2, "head_dim": 8, "rotary_dim": 10}), ["rotary_dim", "10"]),
        (dict(attention={"num_attention_heads": 2, "rotary_dim": 3}), ["rotary_dim", "3"]),
        (dict(attention={"num_attention_heads": 2, "rope_scaling": {"kind": "yarm"}}), ["yarm", "yarn"]),
        (dict(attention={"num_attention_heads": 2, "rope_scaling": {"kind": "longrope"}}), ["long_factor"]),
        (dict(tie_word_embeddings=True, lm_head_bias=True), ["lm_head_bias"]),
        (dict(residual_multiplier=0.0), ["residual_multiplier"]),
        (dict(mlp={"linear_factor": True, "bias": True}), ["mlp.linear_factor", "bias=false"]),
        (
            dict(experts={"name": "feed_forward", "linear_factor": True, "gated": False}),
            ["linear_factor", "gated=true"],
        ),
    ],
)
def test_impossible_settings_are_named(changes, words):
    with pytest.raises(ConfigError) as error:
        tiny_config(**changes)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("rank", [0, 5])
def test_latent_attention_with_its_cache_is_attention_with_the_keys_written_out(rank):
    latent = dict(kv_lora_rank=6, q_lora_rank=rank, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3)
    latent |= dict(q_scale=1.5, kv_scale=0.5)
    model = with_biases(tiny_model(layers="1*dense", attention={"num_attention_heads": 2, "latent": latent}))
    block = jax.tree.map(lambda a: a[0], model.segments[0].blocks[0])
    made, x = block.mixer, normal(0, 1, 6, 16)
    view = View(jnp.arange(6)[None]).with_rotary({made.rotary_key}, jnp.float32)
    whole = made(x, view)[0]
    w = {n: np.asarray(a, np.float64) for n, a in P.arrays(made).items()}
    X = np.asarray(x[0], np.float64)
    q = X @ w["q_a"] if rank else None
    q = np.einsum("sr,rnh->snh", naive.rms_norm(q, w["q_norm.scale"], 1e-6), w["q_b"]) if rank else (
        np.einsum("sd,dnh->snh", X, w["q"])
    )  # fmt: skip
    q, both = 1.5 * q, X @ w["kv_a"]
    kv = np.einsum("sr,rnh->snh", naive.rms_norm(both[:, :6], w["kv_norm.scale"], 1e-6) / 2, w["kv_b"])
    for i in range(6):
        heads = []
        for n in range(2):
            mine = np.append(q[i, n, :4], naive.rope(q[i, n, 4:], i, 1e4))
            keys = [np.append(kv[j, n, :4], naive.rope(both[j, 6:], j, 1e4)) for j in range(i + 1)]
            heads.append(naive.softmax(np.array([mine @ k / 6**0.5 for k in keys])) @ kv[: i + 1, n, 4:])
        np.testing.assert_allclose(whole[0, i], np.einsum("nh,nhd->d", heads, w["o"]), rtol=2e-3, atol=1e-4)
    cache, steps = made.init_cache(1, 8, jnp.float32), []
    for i in range(6):
        one = View(jnp.array([[i]])).with_rotary({made.rotary_key}, jnp.float32)
        out, cache = made(x[:, i : i + 1], one, cache, jnp.int32(i))
        steps.append(out[:, 0])
    np.testing.assert_allclose(np.stack(steps, 1), whole, rtol=1e-4, atol=1e-5)
    assert made.flops_per_token(3) > 0 and {a.shape[-1] for a in cache.values()} == {6, 2, 8}
