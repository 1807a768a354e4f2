"""PEFT's directories in and out, without torch: bit for bit, as experts, and what is refused."""

import json

import jax
import numpy as np
import pytest

from moe_zoo.checkpoints import CheckpointError
from moe_zoo.checkpoints.hf.safetensors import Files, read_header, write
from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build
from moe_zoo.inference import Loaded
from moe_zoo.models import Decoder, ModelConfig
from moe_zoo.transform import add_adapters, load_adapters, merge, save_adapter, unmerge

LLAMA = {
    "vocab_size": 24, "hidden_size": 16, "layers": "3*dense", "intermediate_size": 20,
    "attention": {"num_attention_heads": 4, "num_key_value_heads": 2}, "losses": {},
}  # fmt: skip
ADAPTERS = {
    "name": "lora", "target_modules": ["mixer.q", "mixer.v", "w_down"], "r": 4, "lora_alpha": 6.0,
    "layers_to_transform": [0, 2], "rank_pattern": {"layers.2.mixer.q": 2}, "alpha_pattern": {"w_down": 5.0},
}  # fmt: skip
IDS = np.random.default_rng(0).integers(0, 24, (2, 9)).astype(np.int32)
logits = jax.jit(lambda model: model(IDS)[0])


def llama() -> Loaded:
    config = build(ModelConfig, LLAMA, "model")
    return Loaded(P.materialize(Decoder(config), 0), config, None)


def with_lora(seed: int = 0, **settings) -> Loaded:
    """A LoRA whose every number matters."""
    made = add_adapters(llama(), {**ADAPTERS, **settings})
    rng, values = np.random.default_rng(seed), P.arrays(made.model)
    for path, value in values.items():
        if ".adapters." in path and not path.endswith(".scale"):
            live = 1
            if path.endswith((".a", ".b")):
                live = np.asarray(values[path.rpartition(".")[0] + ".scale"])[..., None] != 0
            values[path] = jax.numpy.asarray(live * rng.standard_normal(value.shape).astype(np.float32) * 0.3)
    made.model = P.replace(made.model, values)
    return made


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True, "layers_to_transform": None}])
def test_out_and_in_again_it_is_the_same_model(settings, tmp_path):
    made = with_lora(**settings)
    save_adapter(made, tmp_path)
    again = load_adapters(llama(), tmp_path)
    old, new = P.arrays(made.model), P.arrays(again.model)
    assert old.keys() == new.keys()
    for path in old:
        if path.endswith("magnitude"):
            np.testing.assert_allclose(new[path], old[path], atol=3e-7)  # stored with the length that it is added to
        else:
            np.testing.assert_array_equal(new[path], old[path], err_msg=path)
    for key in ("r", "lora_alpha", "use_rslora"):
        assert getattr(again.config.adapters.config, key) == getattr(made.config.adapters.config, key)
    save_adapter(again, tmp_path / "twice")
    for name in ("adapter_config.json", *(["adapter_model.safetensors"] if "use_dora" not in settings else [])):
        assert (tmp_path / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_the_files_say_what_peft_reads(tmp_path):
    made = with_lora()
    save_adapter(made, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj"]
    assert config["layers_to_transform"] == [0, 2] and config["r"] == 4 and config["peft_type"] == "LORA"
    assert config["rank_pattern"] == {r"model\.layers\.2\.self_attn\.q_proj": 2}
    assert set(config["alpha_pattern"].values()) == {5} and len(config["alpha_pattern"]) == 2
    tensors = Files(read_header(tmp_path / "adapter_model.safetensors"))
    assert len(tensors.tensors) == 2 * 2 * 3
    a = tensors["base_model.model.model.layers.2.self_attn.v_proj.lora_A.weight"]
    b = tensors["base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight"]
    values = P.arrays(made.model)
    np.testing.assert_array_equal(a, values["segments.0.blocks.0.adapters.mixer.v.a"][2, 0])
    np.testing.assert_array_equal(b.T, values["segments.0.blocks.0.adapters.mixer.v.b"][2, 0])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two directories that differ in ranks, alphas and layers; the models that wrote them."""
    made = [with_lora(1), with_lora(2, r=3, target_modules=["mixer.q", "mixer.o"], layers_to_transform=None,
                                    rank_pattern={}, alpha_pattern={})]  # fmt: skip
    paths = [tmp_path_factory.mktemp("peft") for _ in made]
    for model, path in zip(made, paths):
        save_adapter(model, path)
    return made, paths


def test_experts_by_one_hot_gates_are_the_adapters_merged(two):
    made, paths = two
    mixture = load_adapters(llama(), paths, "mole")
    assert mixture.config.adapters.config.num_experts == 2 and mixture.config.adapters.config.freeze_experts
    for e, alone in enumerate(made):
        gates = [float(i == e) for i in range(2)]
        merged, expected = merge(mixture, gates), merge(alone)
        for path, value in P.arrays(expected.model).items():
            np.testing.assert_allclose(P.arrays(merged.model)[path], value, atol=1e-6, err_msg=path)
        np.testing.assert_allclose(logits(merged.model), logits(alone.model), atol=1e-4)
        assert np.abs(logits(alone.model) - logits(llama().model)).max() > 0.1


def test_arrow_takes_the_direction_that_each_adapter_stretches_most(two):
    made, paths = two
    mixture = load_adapters(llama(), paths, {"name": "arrow", "num_experts_per_tok": 1})
    router = np.asarray(P.arrays(mixture.model)["segments.0.blocks.0.adapters.mixer.q.router"])
    for e, alone in enumerate(made):
        q = alone.model.segments[0].blocks[0].adapters["mixer.q"]
        for layer in (0, 2):
            delta = np.asarray(jax.tree.map(lambda x, i=layer: x[i], q).delta())
            first = np.linalg.svd(delta)[0][:, 0]
            np.testing.assert_allclose(np.abs(router[layer, :, e] @ first), 1, atol=1e-5)
    assert not router[1, :, 0].any(), "the first adapter leaves layer 1 out"


def test_an_expert_that_a_layer_lacks_gets_no_gate(two):
    mixture = load_adapters(llama(), two[1], "loramoe")
    scale = {n: np.asarray(a) for n, a in P.arrays(mixture.model).items() if n.endswith(".scale")}
    live = {n.split(".")[-2]: (a != 0).any(-1).tolist() for n, a in scale.items()}
    assert live["q"] == [[True, True], [False, True], [True, True]]
    assert live["w_down"] == [[True, False], [False, False], [True, False]]
    _, aux, _ = jax.jit(lambda model: model(IDS))(mixture.model)
    load = np.asarray(aux.stats["segments.0.blocks.0"]["load"].total)
    # one unit per token and linear layer: in layer 1 q and o, of the second adapter; in the others v and w_down as well
    np.testing.assert_allclose(load[1], [0, 2 * IDS.size], rtol=1e-6)
    np.testing.assert_allclose(load.sum(-1), np.array([4, 2, 4]) * IDS.size, rtol=1e-6)
    assert (load[0] > IDS.size).all()


def test_merging_and_unmerging_restores_the_base():
    for settings in ({}, {"use_rslora": True}):
        made = with_lora(**settings)
        merged = merge(made)
        assert not merged.config.adapted
        back = unmerge(merged, made)
        for path, value in P.arrays(made.model).items():
            np.testing.assert_allclose(P.arrays(back.model)[path], value, rtol=0, atol=1e-6, err_msg=path)
    dora = with_lora(use_dora=True)
    np.testing.assert_allclose(logits(merge(dora).model), logits(dora.model), atol=1e-4)
    with pytest.raises(ConfigError, match="DoRA rescales the base"):
        unmerge(merge(dora), dora)
    with pytest.raises(ConfigError, match="up to 4 experts, mixed token by token; give weights="):
        merge(add_adapters(llama(), "loramoe"))
    with pytest.raises(ConfigError, match="adapters 'lora' already"):
        add_adapters(made, "lora")


@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_poly_out_and_in_again(alpha, tmp_path):
    settings = {"name": "poly", "target_modules": ["q", "w_up"], "layers_to_transform": [0, 2], "r": 2, "num_tasks": 3,
                "num_skills": 4, "num_splits": 2, "lora_alpha": alpha}  # fmt: skip
    made = add_adapters(llama(), settings)
    rng, values = np.random.default_rng(0), P.arrays(made.model)
    for path in [n for n in values if n.endswith((".a", ".b", ".logits"))]:
        values[path] = jax.numpy.float32(rng.standard_normal(values[path].shape))
    made.model = P.replace(made.model, values)
    save_adapter(made, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["n_tasks"], config["n_skills"], config["n_splits"]) == ("POLY", 3, 4, 2)
    tensors = Files(read_header(tmp_path / "adapter_model.safetensors"))
    name = "base_model.model.model.layers.2.mlp.up_proj.poly_lora_A"
    assert len(tensors.tensors) == 4 * 3 and tensors[name].shape == (2, 4, 8, 2)
    w_up = "segments.0.blocks.0.adapters.ffn.w_up"
    np.testing.assert_array_equal(tensors[name][1, 3, 5, 1], values[f"{w_up}.a"][2, 3, 1, 8 + 5])
    again = load_adapters(llama(), tmp_path)
    for path, value in P.arrays(again.model).items():
        if path.endswith((".a", ".logits")):
            live = np.array([1, 0, 1]).reshape(3, *[1] * (value.ndim - 1))
            np.testing.assert_array_equal(value, live * values[path], err_msg=path)
    domain = np.repeat(np.array([[2], [0]], np.int32), IDS.shape[1], 1)
    of_task = jax.jit(lambda model: model(IDS, domain=domain)[0])
    np.testing.assert_allclose(of_task(again.model), of_task(made.model), atol=1e-4)


def test_settings_are_matched_as_peft_matches_them(tmp_path):
    """Keys are regular expressions over the end of the path; the first one counts."""
    save_adapter(with_lora(), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"target_modules": "anything", "alpha_pattern": {"q_proj": 8, r"layers\.\d\.mlp.*": 2, "down_proj": 99}}
    path.write_text(json.dumps(config))
    scales = {
        n: np.asarray(a) for n, a in P.arrays(load_adapters(llama(), tmp_path).model).items() if n.endswith("scale")
    }
    q, down, v = (scales[f"segments.0.blocks.0.adapters.{n}.scale"][:, 0] for n in ("mixer.q", "ffn.w_down", "mixer.v"))
    np.testing.assert_array_equal(q, [[2, 2, 2, 2], [0] * 4, [4, 4, 0, 0]])
    assert (down[0] == 0.5).all() and (v[2] == 1.5).all()


@pytest.mark.parametrize("change, message", [
    ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported; expected 'LORA'"),
    ({"bias": "all"}, "bias='all' is not supported; expected 'none'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save=.'lm_head'. is not supported"),
    ({"target_parameters": ["mlp.experts.up"]}, "target_parameters=.* is not supported"),
    ({"loftq_config": {"bits": 4}}, "loftq_config is set"),
    ({"r": 5}, r"'model.layers.0.mlp.down_proj' has A \[4, 20\] and B \[16, 4\]; the settings make its rank 5"),
    ({"use_dora": True}, "has no lora_magnitude_vector, and use_dora is true"),
])  # fmt: skip
def test_what_a_lora_of_ours_cannot_be_is_refused_by_name(change, message, tmp_path):
    save_adapter(with_lora(), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load_adapters(llama(), tmp_path)


def test_tensors_that_belong_nowhere_are_named(tmp_path):
    save_adapter(with_lora(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    old = Files(read_header(file))
    arrays = {name: np.array(old[name]) for name in old.tensors}

    def rewritten(change):
        new = {change.get(name, name): array for name, array in arrays.items()}
        write(file, [(n, a.dtype, a.shape) for n, a in new.items()], new.__getitem__)

    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for name, message in [
        (first.replace("q_proj", "q_porj"), "no linear layer 'model.layers.0.self_attn.q_porj'.*|has no lora_"),
        (first.replace("lora_A", "lora_embedding_A"), "is no part of a LoRA of linear layers"),
    ]:
        rewritten({first: name})
        with pytest.raises(CheckpointError, match=message):
            load_adapters(llama(), tmp_path)
    rewritten({n: n.replace(".weight", ".default.weight") for n in arrays})  # as a raw state dict has them
    load_adapters(llama(), tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="adapter_model.safetensors is missing"):
        load_adapters(llama(), tmp_path)
    with pytest.raises(ConfigError, match="experts of 'hydralora' are no LoRAs of their own"):
        save_adapter(with_lora(), tmp_path)
        load_adapters(llama(), [tmp_path], "hydralora")
