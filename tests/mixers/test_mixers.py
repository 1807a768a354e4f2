"""Every recurrent mixer in a small model: padding, packed documents, its cache, gradients, FLOPs; layers by mixer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import jitted, normal, tiny_config, tiny_model

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.inference import generate
from moe_zoo.mixers import MIXERS
from moe_zoo.models import Decoder
from moe_zoo.models.config import parse_layers
from moe_zoo.models.counting import count_parameters, train_flops_per_token
from moe_zoo.sharding import MeshConfig, batch_sharding, make_mesh, sharding_of

SMALL = {
    "lightning": dict(num_heads=2, head_dim=6),
    "short_conv": dict(bias=True),
    "kimi_delta": dict(num_heads=2, head_dim=6, conv_kernel=3),
    "mamba": dict(state_size=3, dt_rank=2, conv_kernel=3, proj_bias=True),
    "mamba2": dict(num_heads=4, head_dim=3, num_groups=2, state_size=5, proj_bias=True, dt_min=0.1),
    "routed_attention": dict(local_window=4, num_clusters=3, window=4, assignment="token_argmax"),
    "gated_delta_net": dict(num_key_heads=2, num_value_heads=4, key_head_dim=6, value_head_dim=3, conv_kernel=3),
}
S = 21


@pytest.fixture(scope="module", params=SMALL)
def made(request):
    """(model, its compiled forward pass): a layer of the mixer, one of attention, weights that make all parts act."""
    mixer = {"name": request.param, **SMALL[request.param]}
    model = tiny_model(
        layers="1*(dense dense:attention)", mixer=mixer, losses={}, attention={"num_attention_heads": 4}
    )  # fmt: skip
    values = P.arrays(model)
    for i, (name, value) in enumerate(sorted(values.items())):
        if ".mixer." in name and value.ndim < 4 and "log" not in name.lower():
            values[name] = value + normal(i, *value.shape, scale=0.5)
    model = P.replace(model, values)
    run = lambda model, tokens, segment_ids=None, valid=None, cache=None: model(
        tokens, segment_ids=segment_ids, valid=valid, cache=cache
    )[::2]
    return model, jitted(model, run)


def tokens(*shape):
    return np.random.default_rng(0).integers(0, 32, shape)


def test_every_recurrent_mixer_is_tested():
    assert {*SMALL, "attention", "none"} == set(MIXERS.names())


def test_padding_anywhere_and_packed_documents_change_nothing(made):
    _, run = made
    ids = tokens(3, S)
    alone = np.asarray(run(ids, None, np.ones((3, S), bool))[0])
    long, valid = np.zeros((3, S + 8), int), np.zeros((3, S + 8), bool)
    places = [np.arange(S) + 8, np.arange(S), np.r_[0:3, 5:12, 17 : S + 7]]
    for row, at in enumerate(places):
        long[row, at], valid[row, at] = ids[row], True
    padded = np.asarray(run(long, None, valid)[0])
    for row, at in enumerate(places):
        np.testing.assert_allclose(padded[row, at], alone[row], rtol=0, atol=2e-5)
    segments = np.zeros((3, S + 8), int)
    ids[1, 13:] = ids[0, : S - 13]
    segments[1, :13], segments[1, 13:S] = 1, 2
    packed = np.asarray(run(np.pad(ids, ((0, 0), (0, 8))), segments, segments > 0)[0])
    np.testing.assert_allclose(packed[1, :13], alone[1, :13], rtol=0, atol=2e-5)
    np.testing.assert_allclose(packed[1, 13:S], alone[0, : S - 13], rtol=0, atol=2e-5)


def test_with_its_cache_it_goes_on_as_if_all_had_been_seen_at_once(made):
    model, run = made
    ids = tokens(2, S)
    whole = np.asarray(run(ids)[0])
    cache = model.init_cache(2, S + 6)
    # 7 tokens, 3 of padding behind the first row and before the second, then the rest one by one
    first = np.zeros((2, 10), int)
    first[0, :7], first[1, 3:] = ids[0, :7], ids[1, :7]
    valid = np.zeros((2, 10), bool)
    valid[0, :7] = valid[1, 3:] = True
    positions = jnp.asarray(np.maximum(np.cumsum(valid, 1) - 1, 0))
    continued = jitted(
        model, lambda m, ids, positions, valid, cache: m(ids, positions=positions, valid=valid, cache=cache)[::2]
    )
    logits, cache = continued(first, positions, jnp.asarray(valid), cache)
    np.testing.assert_allclose(np.asarray(logits)[valid].reshape(2, 7, -1), whole[:, :7], rtol=0, atol=2e-5)
    for t in range(7, S):
        at = jnp.full((2, 1), t)
        logits, cache = continued(ids[:, t : t + 1], at, jnp.ones((2, 1), bool), cache)
        np.testing.assert_allclose(logits[:, 0], whole[:, t], rtol=0, atol=2e-5)
    assert all(a.shape[2] != S + 6 for a in jax.tree.leaves(cache["segments"][0][0]["mixer"]))


def test_greedy_text_is_that_of_full_forward_passes(made):
    model, run = made
    prompts = [tokens(1, n)[0] for n in (3, 9)]
    for prompt, new in zip(prompts, generate(model, prompts, 6, temperature=0.0)):
        text = list(prompt)
        for _ in range(6):
            ids, valid = np.zeros((1, S), int), np.arange(S)[None] < len(text)
            ids[0, : len(text)] = text
            text.append(int(np.asarray(run(ids, None, valid)[0])[0, len(text) - 1].argmax()))
        np.testing.assert_array_equal(new, text[len(prompt) :])


def test_on_a_mesh_outputs_and_gradients_are_those_of_one_device(made):
    model, _ = made
    ids = tokens(4, S)
    segments = np.where(np.arange(S) < 12, 1, 2)[None].repeat(4, 0)
    segments[2, -4:] = 0
    weights = normal(9, 4, S, 32) * (segments > 0)[..., None]

    def run(model, ids, segments):
        weigh = lambda model: (model(ids, segment_ids=segments, valid=segments > 0)[0] * weights).sum()
        return jax.value_and_grad(weigh, allow_int=True)(model)

    alone = jax.device_get(jitted(model, run)(ids, segments))
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2), jax.devices()[:8])
    variables = P.flat(model)
    place = lambda n, a: jax.device_put(a, sharding_of(mesh, variables[n].logical_axes, a.shape, n))
    placed = P.replace(model, {n: place(n, a) for n, a in P.arrays(model).items()})
    batch = jax.device_put((ids, segments), batch_sharding(mesh))
    many = jax.device_get(jitted(placed, run)(*batch))
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())
    jax.tree.map(near, many, alone)
    split = [n for n, a in P.arrays(placed).items() if a.addressable_shards[0].data.size < a.size and ".mixer." in n]
    assert len(split) > 4


def test_every_parameter_of_it_is_trained(made):
    model, _ = made
    ids, weights = tokens(2, S), normal(9, 2, S, 32)
    loss = jitted(
        model, lambda model, ids: jax.grad(lambda model: (model(ids)[0] * weights).sum(), allow_int=True)(model)
    )
    grads = {n: v.get_value() for n, v in P.flat(loss(ids)).items() if ".mixer." in n and not isinstance(v, P.Buffer)}
    assert all(np.isfinite(g).all() and np.abs(np.asarray(g)).max() > 1e-4 for g in grads.values())


def test_products_with_the_parameters_are_counted(made):
    """Twice the size of each matrix, the convolution's too; what the state takes is at most twice as much again."""
    block = made[0].segments[0].blocks[0]
    matrices = sum(v.get_value()[0].size for v in P.flat(block.mixer).values() if v.get_value().ndim > 2)
    assert 2 * matrices <= block.mixer.flops_per_token(10) == block.mixer.flops_per_token(1000) < 6 * matrices


def test_layers_without_a_mixer_or_a_feed_forward_part():
    mixer = {"name": "gated_delta_net", **SMALL["gated_delta_net"]}
    model = tiny_model(layers="1*(mixer moe:none mixer:attention dense:none)", mixer=mixer)
    blocks = model.segments[0].blocks
    assert [hasattr(b, "mixer") for b in blocks] == [True, False, True, False]
    assert [hasattr(b, "ffn") for b in blocks] == [False, True, False, True]
    ids = tokens(1, S)
    (logits, aux, cache) = jitted(model, lambda m, ids: m(ids, cache=m.init_cache(1, S)))(ids)
    plain, _, _ = jitted(model, lambda m, ids: m(ids))(ids)
    np.testing.assert_allclose(logits, plain, rtol=0, atol=2e-5)
    assert list(aux.layers) == ["segments.0.blocks.1"] and aux.total_loss() > 0
    counts = count_parameters(model)
    experts = 3 * 4 * 16 * 8
    assert counts["active"] == counts["total"] - experts // 2
    parts = sum(b.flops_per_token(11.0) for b in blocks)
    assert train_flops_per_token(model, 21) == 3 * (parts + 2 * 16 * 32)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"layers": "1*moe:gated_delta"}, ["gated_delta", "gated_delta_net"]),
        ({"layers": "1*mixer:none"}, ["none", "nothing"]),
        ({"mixer": {"name": "gated_delta_net", "num_value_heads": 3}}, ["mixer.num_value_heads", "num_key_heads=4"]),
        ({"mixer": {"name": "gated_delta_nett"}}, ["did you mean 'gated_delta_net'"]),
    ],
)
def test_what_cannot_be_is_named(settings, words):
    with pytest.raises(ConfigError) as error:
        tiny_config(**settings)
    assert all(word in str(error.value) for word in words), error.value


def test_a_router_that_looks_at_attention_needs_it():
    router = {"name": "attention_aware"}
    with pytest.raises(ConfigError, match="looks at the attention below it.*gated_delta_net"):
        Decoder(tiny_config(mixer="gated_delta_net", router=router, losses={}))


def test_a_mixer_by_name_is_a_variant_but_for_one_that_is_declared():
    variants = {"attention": {"attention": {"sliding_window": 3}}}
    config = tiny_config(layers="2*(moe moe:attention)", mixer="gated_delta_net")
    assert parse_layers(config.layers, "")[0].pattern == ("moe", "moe:attention")
    assert [config.variant(k).mixer.name for k in ("moe", "moe:attention")] == ["gated_delta_net", "attention"]
    declared = tiny_config(layers="2*(moe moe:attention)", mixer="gated_delta_net", variants=variants)
    assert declared.variant("moe:attention").mixer.name == "gated_delta_net"
