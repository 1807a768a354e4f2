"""Meshes over eight devices, where arrays live on them, and that a sharded model computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from naive import jitted, tiny_config, tiny_model

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.models import Decoder
from moe_zoo.sharding import DEFAULT_RULES, MESH_AXES, MeshConfig, batch_sharding, make_mesh, sharding_of


def mesh_of(*sizes):
    return make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize(
    "config, sizes",
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(fsdp=2), (4, 2, 1, 1)),
        (MeshConfig(1, 2, 2, 2), (1, 2, 2, 2)),
        (MeshConfig(tensor=8), (1, 1, 1, 8)),
    ],
)
def test_mesh_has_the_asked_sizes_and_data_takes_the_rest(config, sizes):
    mesh = make_mesh(config)
    assert mesh.axis_names == MESH_AXES and tuple(mesh.shape.values()) == sizes
    assert len({d.id for d in mesh.devices.flat}) == 8


def test_mesh_over_fewer_devices():
    assert make_mesh(devices=jax.devices()[:2]).shape["data"] == 2


@pytest.mark.parametrize(
    "config, words",
    [
        (MeshConfig(fsdp=3), ["fsdp=3", "3", "8"]),
        (MeshConfig(data=2, tensor=2), ["data=2", "tensor=2", "4", "8"]),
        (MeshConfig(16, 1), ["data=16", "16", "8"]),
    ],
)
def test_sizes_that_do_not_cover_the_devices_are_refused_with_both_numbers(config, words):
    with pytest.raises(ConfigError) as error:
        make_mesh(config)
    assert all(w in str(error.value) for w in words), error.value


@pytest.mark.parametrize(
    "config, name",
    [
        (MeshConfig(data=0), "data"),
        (MeshConfig(data=-2), "data"),
        (MeshConfig(fsdp=0), "fsdp"),
        (MeshConfig(tensor=-1), "tensor"),
    ],
)
def test_sizes_below_one_are_refused_by_name(config, name):
    with pytest.raises(ConfigError, match=rf"mesh\.{name}"):
        config.validate("mesh")


def test_sharding_follows_the_rules_and_leaves_out_axes_of_size_one():
    where = lambda axes, shape, *sizes: sharding_of(mesh_of(*sizes), axes, shape, "w").spec
    assert where(("embed", "mlp"), (4, 6), 2, 2, 1, 2) == PartitionSpec("fsdp", "tensor")
    assert where(("embed", "mlp"), (4, 6), 8, 1, 1, 1) == PartitionSpec(None, None)
    assert where(("expert", "embed", None), (8, 3, 5), 1, 1, 8, 1) == PartitionSpec("expert", None, None)
    assert where(("batch", "seq"), (8, 3), 2, 2, 2, 1) == PartitionSpec(("data", "fsdp", "expert"), None)
    assert batch_sharding(mesh_of(2, 2, 2, 1)).shard_shape((8, 3)) == (1, 3)


@pytest.mark.parametrize(
    "axes, shape, words",
    [
        (("mlp", "vocab"), (4, 4), ["layers.0.w", "'mlp'", "'vocab'", "'tensor'"]),
        (("embed", "mlp"), (4, 5), ["layers.0.w", "'mlp'", "5", "2", "tensor"]),
        (("embed",), (3,), ["layers.0.w", "'embed'", "3", "2", "fsdp"]),
        (("batch",), (6,), ["layers.0.w", "'batch'", "6", "4"]),
        (("embd",), (4,), ["layers.0.w", "'embd'", "did you mean 'embed'"]),
    ],
)
def test_what_cannot_be_sharded_is_named_with_its_dim_and_numbers(axes, shape, words):
    with pytest.raises(ConfigError) as error:
        sharding_of(mesh_of(2, 2, 1, 2), axes, shape, "layers.0.w")
    assert all(w in str(error.value) for w in words), error.value


def test_another_table_of_rules_is_another_strategy():
    rules = {**DEFAULT_RULES, "embed": ("tensor",), "mlp": ()}
    assert sharding_of(mesh_of(2, 2, 1, 2), ("embed", "mlp"), (4, 5), "w", rules).spec == PartitionSpec("tensor", None)


FULL = {
    "layers": "1*dense 2*moe",
    "num_experts": 8,
    "vocab_size": 264,
    "attention": {"num_attention_heads": 4, "num_key_value_heads": 2, "qk_norm": "head"},
    "shared_expert_size": 16,
    "shared_expert_gate": True,
    "ngram": {"orders": [2], "buckets": 64},
    "router": {
        "name": "top_k",
        "correction_bias": True,
        "linear_bias": True,
        "score_function": "sigmoid",
        "init_std": 1.0,
    },
}
HEADS = {
    **FULL,
    "attention": {"num_attention_heads": 2, "qk_norm": "full"},
    "norm": "layer",
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (2, 1, 2, 2), (1, 2, 2, 2)])
@pytest.mark.parametrize("settings", [FULL, HEADS])
def test_every_parameter_of_a_decoder_has_a_place(sizes, settings):
    mesh = mesh_of(*sizes)
    sharded = set()
    for path, var in P.flat(Decoder(tiny_config(**settings))).items():
        shape = var.get_value().shape
        if sharding_of(mesh, var.logical_axes, shape, path).shard_shape(shape) != shape:
            sharded.add(path.rpartition(".")[2])
    expected = {(8, 1, 1, 1): set(), (1, 8, 1, 1): {"table", "w_up", "q", "kernel"}, (1, 1, 8, 1): {"w_up"}}
    assert expected.get(sizes, {"table", "w_up", "w_down", "q", "o"}) <= sharded and (sharded or sizes[0] == 8)


def test_a_sharded_forward_pass_equals_the_unsharded_one():
    model = tiny_model(layers="1*moe", attention=FULL["attention"], shared_expert_size=16, router=FULL["router"])
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (4, 12)), jnp.int32)
    forward = lambda m, t: m(t)[:2]
    plain_logits, plain_aux = jax.device_get(jitted(model, forward)(tokens))
    mesh = mesh_of(2, 2, 1, 2)
    variables = P.flat(model)
    places = {n: sharding_of(mesh, v.logical_axes, v.get_value().shape, n) for n, v in variables.items()}
    placed = P.replace(model, {n: jax.device_put(a, places[n]) for n, a in P.arrays(model).items()})
    q = placed.segments[0].blocks[0].mixer.q[...]
    assert q.sharding.shard_shape(q.shape) == (1, 8, 2, 4)
    logits, aux = jax.device_get(jitted(placed, forward)(jax.device_put(tokens, batch_sharding(mesh))))
    np.testing.assert_allclose(logits, plain_logits, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), aux, plain_aux)
