"""MoS: which shards each layer has, what becomes of their gradients, and the plain LoRAs that it amounts to."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_zoo
from moe_zoo.adapters.mos import MosConfig, Pool
from moe_zoo.adapters.targets import Linear
from moe_zoo.checkpoints import Checkpoints
from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build, to_dict
from moe_zoo.inference import Loaded
from moe_zoo.models import Decoder, ModelConfig
from moe_zoo.models.counting import count_adapters, count_parameters
from moe_zoo.transform import add_adapters, as_lora, join_experts, load_adapters, merge, save_adapter, unmerge

LLAMA = {
    "vocab_size": 24, "hidden_size": 16, "layers": "4*dense", "intermediate_size": 20,
    "attention": {"num_attention_heads": 4, "num_key_value_heads": 2}, "losses": {},
}  # fmt: skip
MOS = {"name": "mos", "target_modules": ["q", "v", "w_down"], "r": 5, "rank_budget": 2, "shards_per_vector": 2}
LAYERS, D, N = 4, 8, 12
IDS = np.random.default_rng(0).integers(0, 24, (2, 9)).astype(np.int32)
logits = jax.jit(lambda model: model(IDS)[0])


def pool(seed: int = 0, **settings) -> Pool:
    """Of four layers, with values that matter."""
    config = MosConfig(**{"r": 5, "rank_budget": 2, "private_rank": 1, "shards_per_vector": 2, **settings})
    made = P.materialize(Pool(config, Linear("mixer.q", D, N, (None, None)), tuple(range(LAYERS)), LAYERS), seed)
    rng = np.random.default_rng(seed)
    fill = lambda n, a: a if n == "index" else jnp.asarray(rng.standard_normal(a.shape), jnp.float32)
    return P.replace(made, {n: fill(n, a) for n, a in P.arrays(made).items()})


def mos(**settings) -> Loaded:
    config = build(ModelConfig, LLAMA, "model")
    made = add_adapters(Loaded(P.materialize(Decoder(config), 0), config, None), MOS | settings)
    rng, values = np.random.default_rng(1), P.arrays(made.model)
    for path, value in values.items():
        if ".shards_" in path:
            values[path] = jnp.asarray(0.4 * rng.standard_normal(value.shape), jnp.float32)
    made.model = P.replace(made.model, values)
    return made


def test_every_layer_has_its_own_private_shards_and_public_ones_without_repeats():
    for settings in ({}, {"private_rank": 0}, {"shards_per_vector": 1}, {"r": 2, "private_rank": 2}):
        made = pool(**settings)
        c = MosConfig(**{"r": 5, "rank_budget": 2, "private_rank": 1, "shards_per_vector": 2, **settings})
        per, shards = c.shards_per_vector, c.rank_budget * LAYERS * c.shards_per_vector
        public, own = (c.rank_budget - c.private_rank) * LAYERS * per, c.private_rank * per
        index = np.asarray(made.index[...])
        assert index.dtype == np.int32 and index.shape == (2, LAYERS, c.r * per)
        assert made.shards_a[...].shape == (shards, D // per) and made.shards_b[...].shape == (shards, N // per)
        for side in index:
            assert all(len(set(row)) == len(row) for row in side.tolist())
            uses = np.bincount(side.ravel(), minlength=shards)
            assert (uses[public:] == 1).all() and uses[:public].sum() == LAYERS * (c.r - c.private_rank) * per
            np.testing.assert_array_equal(side[:, c.r * per - own :], public + np.arange(LAYERS * own).reshape(4, own))
        drawn = index[:, :, : c.r * per - own]
        if drawn.size:
            assert (drawn[0] != drawn[1]).any() and (drawn[0, 0] != drawn[0, 1]).any()
            assert (np.sort(drawn) != drawn).any()  # which shards are neighbours in a row is drawn, too


def test_each_way_to_tell_layers_apart_can_be_left_out():
    one = np.asarray(pool(pair_dissociation=False).index[...])
    assert one.shape[0] == 1
    same = np.asarray(pool(subset_selection=False).index[...])
    assert (same[:, :, :8] == same[:, :1, :8]).all() and (same[0] != same[1]).any()
    whole = pool(shards_per_vector=1)
    rows = np.asarray(whole.index[...])
    np.testing.assert_array_equal(whole.vectors()[0], np.asarray(whole.shards_a[...])[rows[0]])
    # pure sharing: all layers have all vectors, in one order
    shared = pool(r=8, private_rank=0, shards_per_vector=1, subset_selection=False, pair_dissociation=False)
    index = np.asarray(shared.index[...])
    assert (np.sort(index[0]) == np.arange(8)).all() and (index[0] == index[0, 0]).all()
    # nothing public: a LoRA of each layer's own
    a, b = pool(r=2, private_rank=2).vectors()
    own = pool(r=2, private_rank=2)
    np.testing.assert_array_equal(a, np.asarray(own.shards_a[...]).reshape(LAYERS, 2, D))
    np.testing.assert_array_equal(b, np.asarray(own.shards_b[...]).reshape(LAYERS, 2, N))


def test_the_gradient_of_a_shard_is_the_sum_over_its_uses():
    made = pool()
    rng = np.random.default_rng(2)
    given = [rng.standard_normal(x.shape).astype(np.float32) for x in made.vectors()]
    values = P.arrays(made)

    def total(shards_a, shards_b):
        vectors = P.replace(made, values | {"shards_a": shards_a, "shards_b": shards_b}).vectors()
        return sum((v * g).sum() for v, g in zip(vectors, given))

    found = jax.grad(total, argnums=(0, 1))(values["shards_a"], values["shards_b"])
    for side, (gradient, g) in enumerate(zip(found, given)):
        expected = np.zeros(gradient.shape)
        for row, index in zip(g, np.asarray(made.index[...])[side]):
            for place, shard in enumerate(index):
                expected[shard] += row.reshape(-1, gradient.shape[1])[place]
        np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_it_is_plain_lora_merged_and_in_peft_files(tmp_path):
    made = mos()
    plain = as_lora(made)
    assert plain.config.adapters.name == "lora" and plain.config.adapters.config.r == 5
    expected = logits(made.model)
    base = merge(plain, [0.0])
    assert np.abs(expected - logits(base.model)).max() > 0.1
    np.testing.assert_allclose(logits(plain.model), expected, atol=1e-5)
    merged = merge(made)
    np.testing.assert_allclose(logits(merged.model), expected, atol=2e-4)
    for name, value in P.arrays(unmerge(merged, made).model).items():
        np.testing.assert_allclose(value, P.arrays(made.model)[name], atol=2e-6, err_msg=name)
    save_adapter(made, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["r"] == 5 and settings["lora_alpha"] == 16 and settings["peft_type"] == "LORA"
    again = P.arrays(load_adapters(base, tmp_path).model)
    for name, value in P.arrays(plain.model).items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    joined = P.arrays(join_experts(base, [made, made], "mole").model)
    for name, value in P.arrays(plain.model).items():
        if name.endswith((".a", ".b")):
            np.testing.assert_array_equal(joined[name], np.concatenate([value, value], axis=1), err_msg=name)
    # LoRAs cannot be taken apart again
    with pytest.raises(ConfigError, match="experts of 'mos' are no LoRAs of their own"):
        load_adapters(base, [tmp_path], MOS)


def test_indices_survive_saving_and_a_narrower_type(tmp_path):
    made = mos()
    kind = lambda v: "frozen" if isinstance(v, P.Frozen) else "trainable"
    groups = {"trainable": {}, "frozen": {}, "buffers": {}}
    for name, variable in P.flat(made.model).items():
        groups[kind(variable)][name] = variable.get_value()
    settings = {"model": to_dict(made.config), "data": {"tokenizer": "bytes"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_params(1, groups)
    checkpoints.close()
    got = P.arrays(moe_zoo.load(tmp_path, dtype="bfloat16").model)
    for name, value in P.arrays(made.model).items():
        if name.endswith(".index"):
            assert got[name].dtype == jnp.int32
            np.testing.assert_array_equal(got[name], value)
    assert got["adapters.pools.mixer.q.shards_a"].dtype == jnp.bfloat16


def test_as_much_trains_as_of_loras_of_the_budgets_rank():
    def count(**adapters):
        model = Decoder(build(ModelConfig, LLAMA | {"adapters": adapters}, "model"))
        return count_adapters(model)["matched"], count_parameters(model)["trainable"]

    sizes = 16 + 16, 16 + 8, 20 + 16
    assert count(**MOS) == (12, 2 * 4 * sum(sizes)) == count(name="lora", target_modules=MOS["target_modules"], r=2)
    # of two layers
    assert count(**MOS | {"layers_to_transform": [1, 3], "r": 3}) == (6, 2 * 2 * sum(sizes))
    index = P.materialize(
        Decoder(build(ModelConfig, LLAMA | {"adapters": MOS | {"layers_to_transform": [1, 3], "r": 3}}, "model")), 0
    ).adapters.pools["mixer.q"].index[...]  # fmt: skip
    np.testing.assert_array_equal(index[0, 1::2, 4:], [[4, 5], [6, 7]])


@pytest.mark.parametrize("settings, message", [
    ({"r": 6}, "rank_budget=2 and private_rank=1 'mixer.q' of 4 layers has 4 public ranks, so r is at most 5"),
    ({"r": 3, "private_rank": 2}, "so r is at most 2"),
    ({"private_rank": 3}, "private_rank: 3; expected 0 to 2, of rank_budget=2 and r=5"),
    ({"shards_per_vector": 3}, "shards_per_vector: 3 shards do not divide 16 dims of 'mixer.q'"),
    ({"rank_pattern": {"q": 2}}, "rank_pattern: layers that share a pool all have rank r=5"),
])  # fmt: skip
def test_what_cannot_be_put_together_is_named_before_anything_is_made(settings, message):
    with pytest.raises(ConfigError, match=message):
        Decoder(build(ModelConfig, LLAMA | {"adapters": MOS | settings}, "model"))


def test_layers_of_other_sizes_cannot_share():
    other = {"layers": "2*dense 2*dense:wide", "variants": {"wide": {"intermediate_size": 24}}}
    with pytest.raises(ConfigError, match=r"'ffn.w_down' has sizes \(20, 16\) and \(24, 16\), which cannot share"):
        Decoder(build(ModelConfig, LLAMA | other | {"adapters": MOS}, "model"))
