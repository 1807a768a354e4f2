"""PEFT's directories in and out, without torch: bit for bit, as experts, and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest

from moe_zoo.checkpoints import CheckpointError, hf
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_adapter(with_lora(), folder)
    return folder


@pytest.mark.parametrize("change, message", [
    ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported; expected 'LORA'"),
    ({"bias": "all"}, "bias='all' is not supported; expected 'none'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save=.'lm_head'. is not supported"),
    ({"target_parameters": ["mlp.gate.weight"]}, "target_parameters: expected a list of experts' weights"),
    ({"target_parameters": "mlp.experts.down_proj"}, "target_parameters: expected a list of experts' weights"),
    ({"loftq_config": {"bits": 4}}, "loftq_config is set"),
    ({"r": 5}, r"'model.layers.0.mlp.down_proj' has A \[4, 20\] and B \[16, 4\]; the settings make its rank 5"),
    ({"use_dora": True}, "has no lora_magnitude_vector, and use_dora is true"),
    ({"r": True}, "r: expected a whole number > 0, got true"),
    ({"r": 0}, "r: expected a whole number > 0, got 0"),
    ({"lora_alpha": "6"}, 'lora_alpha: expected a number > 0, got "6"'),
    ({"lora_alpha": float("nan")}, "lora_alpha: expected a number > 0, got NaN"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern: expected whole numbers > 0 by regular expression"),
    ({"rank_pattern": {"(": 4}}, "rank_pattern: expected whole numbers > 0 by regular expression"),
    ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern: expected numbers > 0 by regular expression"),
    ({"use_rslora": "no"}, "use_rslora: expected true or false"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices=.1. is not supported"),
    ({"layer_replication": [[0, 2]]}, "layer_replication=..0, 2.. is not supported"),
])  # fmt: skip
def test_what_a_lora_of_ours_cannot_be_is_refused_by_name(change, message, saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as error:
        load_adapters(llama(), tmp_path)
    assert "\n" not in str(error.value)


def test_tensors_that_belong_nowhere_are_named(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_model.safetensors"
    old = Files(read_header(file))
    arrays = {name: np.array(old[name]) for name in old.tensors}

    def rewritten(change):
        """`change`: name -> another name, or another array, or None for no tensor."""
        new = {}
        for name, array in arrays.items():
            to = change.get(name, name)
            if to is not None:
                new[to if isinstance(to, str) else name] = array if isinstance(to, str) else to
        write(file, [(n, a.dtype, a.shape) for n, a in new.items()], new.__getitem__)

    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    second = first.replace("lora_A", "lora_B")
    for name, to, message in [
        (first, first.replace("q_proj", "q_porj"), "no linear layer 'model.layers.0.self_attn.q_porj'.*|has no lora_"),
        (first, first.replace("lora_A", "lora_embedding_A"), "is no part of a LoRA of linear layers"),
        (first, first.replace("lora_A.weight", "lora_B.bias"), "lora_B.bias' is no part of a LoRA of linear layers"),
        (first, "base_model.model.lm_head.weight", "'lm_head.weight' is no part of a LoRA of linear layers"),
        (first, second.replace(".weight", ".default.weight"), "'model.layers.0.self_attn.q_proj' has two lora_B"),
        (first, first.replace("q_proj", "q_proj.base_layer"), "tensors of 2 parameters; target_parameters name 0"),
        (second, None, "'model.layers.0.self_attn.q_proj' has no lora_B"),
        (second, arrays[second][:-1], "LoRA of inputs and outputs 16 and 15, beside a weight of 16 and 16"),
        (first, arrays[first][None], r"q_proj' has A \[1, 4, 16\] and B"),
        (first, arrays[first].astype(np.int32), "lora_A.weight' is I32; expected floating-point numbers"),
    ]:
        rewritten({name: to})
        with pytest.raises(CheckpointError, match=message):
            load_adapters(llama(), tmp_path)
    rewritten({n: n.replace(".weight", ".default.weight") for n in arrays})  # as a raw state dict has them
    load_adapters(llama(), tmp_path)
    file.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="adapter_model.safetensors is missing .adapter_model.bin is a pickle"):
        load_adapters(llama(), tmp_path)
    with pytest.raises(ConfigError, match="experts of 'hydralora' are no LoRAs of their own"):
        load_adapters(llama(), [saved], "hydralora")
    for text in ("[]", "{", "[" * 100_000):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(CheckpointError, match="adapter_config.json cannot be read"):
            load_adapters(llama(), tmp_path)


MIXTRAL = {
    "vocab_size": 24, "hidden_size": 16, "layers": "2*moe", "num_experts": 3, "moe_intermediate_size": 10,
    "attention": {"num_attention_heads": 4},
}  # fmt: skip
BANK = "segments.0.blocks.0.ffn.experts.adapters"


def mixtral() -> Loaded:
    config = build(ModelConfig, MIXTRAL, "model")
    return Loaded(P.materialize(Decoder(config), 0), config, None)


def with_expert_lora(one_a: bool = False, **settings) -> Loaded:
    made = add_adapters(mixtral(), {"name": "lora", "target_modules": ["experts.*"], "r": 2, **settings})
    rng, values = np.random.default_rng(0), P.arrays(made.model)
    for path, value in values.items():
        if ".adapters." in path and not path.endswith(".scale"):
            values[path] = jax.numpy.asarray(rng.standard_normal(value.shape).astype(np.float32) * 0.1)
    if one_a:
        values[f"{BANK}.w_up.a"] = values[f"{BANK}.w_gate.a"]
    made.model = P.replace(made.model, values)
    return made


@pytest.mark.parametrize("settings, rank", [
    ({"one_a": True}, 2),
    ({}, 4),
    ({"use_rslora": True, "lora_alpha": 3.0}, 4),
    ({"rank_pattern": {"w_up": 1}, "alpha_pattern": {"w_up": 8.0}}, 3),
    ({"target_modules": ["experts.w_up"]}, 2),
    ({"target_modules": ["layers.1.ffn.experts.*"]}, 4),
], ids=["one_a", "two", "rslora", "ranks", "up", "one_layer"])  # fmt: skip
def test_loras_of_experts_are_parameters_of_all_of_them_and_back(settings, rank, tmp_path):
    """PEFT has one A for gate and up: as it is where ours are equal, else one below the other."""
    made = with_expert_lora(**settings)
    save_adapter(made, tmp_path)
    tensors = Files(read_header(tmp_path / "adapter_model.safetensors")).tensors
    inner = ".base_layer" * any("base_layer" in name for name in tensors)
    experts = f"base_model.model.model.layers.1.mlp.experts{inner}"
    assert tensors[f"{experts}.lora_A.weight"].shape == (3 * rank, 16)
    assert tensors[f"{experts}.lora_B.weight"].shape == (20, 3 * rank)
    again = load_adapters(mixtral(), tmp_path)
    old, new = P.arrays(made.model), P.arrays(again.model)
    if rank == 4 or "one_a" in settings:  # halves are told apart where they are equally large
        assert old.keys() == new.keys()
        live = lambda n: np.asarray(old[n.rpartition(".")[0] + ".scale"]).any(-1)[:, None, None, None]
        for path in old:
            value = live(path) * old[path] if path.endswith((".a", ".b")) else old[path]
            np.testing.assert_array_equal(new[path], value, err_msg=path)
    merged = merge(again)
    for path, value in P.arrays(merge(made).model).items():
        np.testing.assert_allclose(P.arrays(merged.model)[path], value, rtol=0, atol=1e-6, err_msg=path)
    for path, value in P.arrays(unmerge(merged, again).model).items():
        np.testing.assert_allclose(value, new[path], rtol=0, atol=1e-6, err_msg=path)
    save_adapter(again, tmp_path / "twice")
    files = [Files(read_header(folder / "adapter_model.safetensors")) for folder in (tmp_path, tmp_path / "twice")]
    for name in tensors:
        np.testing.assert_array_equal(files[1][name], files[0][name], err_msg=name)


def test_loras_of_experts_that_cannot_be_exchanged_are_named(tmp_path):
    with pytest.raises(ConfigError, match="w_gate is scaled by 8 and w_up by 1.5; PEFT has one scale for both"):
        save_adapter(with_expert_lora(alpha_pattern={"w_up": 3.0}), tmp_path)
    save_adapter(with_expert_lora(), tmp_path)
    path = tmp_path / "adapter_config.json"
    right = json.loads(path.read_text())
    assert right["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert right["target_modules"] == [] and right["lora_alpha"] == 16 and right["r"] == 2
    for change, message in [
        ({"target_parameters": ["mlp.experts.down_proj"]}, "has tensors of 2 parameters; target_parameters name 1"),
        ({"target_parameters": None}, "has tensors of 2 parameters; target_parameters name 0 of it"),
        ({"rank_pattern": {".*down_proj": 5}}, r"down_proj' has A \[6, 10\] .* make its rank 5 of each expert"),
        ({"rank_pattern": {".*down_proj": 6, ".*gate_up_proj": 4}}, "10 and 16, of 1 experts, beside .* of 3 experts"),
    ]:
        path.write_text(json.dumps(right | change))
        with pytest.raises(CheckpointError, match=message):
            load_adapters(mixtral(), tmp_path)
    path.write_text(json.dumps(right))
    with pytest.raises(ConfigError, match="is of experts that are routed already"):
        load_adapters(mixtral(), [tmp_path, tmp_path], "mole")
    with pytest.raises(CheckpointError, match="the model has no linear layer 'model.layers.0.mlp.experts.down_proj'"):
        load_adapters(llama(), tmp_path)
    given = {"vocab_size": 24, "d_model": 16, "n_heads": 4, "n_layers": 1, "attn_config": {"kv_n_heads": 2},
             "ffn_config": {"ffn_hidden_size": 6, "moe_num_experts": 2, "moe_top_k": 1}}  # fmt: skip
    config = hf.architectures()["DbrxForCausalLM"].read(given)
    dbrx = Loaded(P.materialize(Decoder(config), 0), config, None)  # tensors of its own kind for both
    for target, message in [
        ("experts.w_up", "'layers.0.ffn.experts': PEFT can have no LoRA beside the experts of this family"),
        ("mixer.q", "'layers.0.mixer.q': its published weight is no tensor of its own"),
    ]:
        with pytest.raises(ConfigError, match=message):
            save_adapter(add_adapters(dbrx, {"name": "lora", "target_modules": [target]}), tmp_path)


def test_xlora_sends_tokens_to_one_expert_as_its_lora_merged_and_is_written_as_a_whole(two, tmp_path):
    made, paths = two
    settings = {"name": "xlora", "top_k_lora": 1, "enable_softmax_topk": True, "layerwise_scalings": True}
    mixture = load_adapters(llama(), paths, settings)
    values = P.arrays(mixture.model)
    for e, alone in enumerate(made):
        bias = np.tile(100.0 * (np.arange(2) == e), values["adapters.bias"].size // 2).astype(np.float32)
        mixture.model = P.replace(mixture.model, values | {"adapters.bias": jax.numpy.asarray(bias)})
        np.testing.assert_allclose(logits(mixture.model), logits(merge(alone).model), atol=1e-4)
    save_adapter(mixture, tmp_path)
    again = P.arrays(load_adapters(llama(), tmp_path).model)
    live = np.asarray(again["adapters.kernel"]).any(0)
    assert live.sum() == 2 * (4 + 2 + 4)  # PEFT has no gates for linear layers that no LoRA is beside
    for path, value in P.arrays(mixture.model).items():
        here = live if path in ("adapters.kernel", "adapters.bias") else slice(None)
        np.testing.assert_array_equal(again[path][..., here], value[..., here], err_msg=path)
    path = tmp_path / "adapter_config.json"
    right = json.loads(path.read_text())
    for change, message in [
        ({"xlora_depth": 2}, "xlora_depth=2 is not supported; expected 1"),
        ({"enable_softmax": False}, "enable_softmax=False is not supported; expected True"),
        ({"softmax_temperature": 0}, "softmax_temperature: expected a number > 0, got 0"),
        ({"top_k_lora": "1"}, "top_k_lora: expected a whole number > 0 or null"),
        ({"adapters": ["a"]}, "adapters: expected directories by name"),
        ({"adapters": {"x": str(tmp_path)}}, "peft_type 'XLORA' is not supported; expected 'LORA'"),
        ({"adapters": {"x": "a" * 1000}}, "adapters.x: neither a.* has a LoRA"),
        ({"adapters": {"x": "/nowhere"}}, "adapters.x: neither /nowhere nor .* has a LoRA"),
        (
            {"adapters": {"0": right["adapters"]["0"]}},
            r"classifier is .20, 16.; 1 adapters with 6 gates each, hidden size 16, take .6, 16.",
        ),
        ({"layerwise_scalings": False}, "2 adapters with 1 gates each"),
    ]:
        path.write_text(json.dumps(right | change))
        with pytest.raises(CheckpointError, match=message):
            load_adapters(llama(), tmp_path)
