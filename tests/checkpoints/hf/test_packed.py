"""Weights stored in fewer bits: blocks of 8-bit floats decoded as they say, other formats refused, names on the hub."""

import json

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
from released import RELEASED
from test_files import SMALL, config_with, folder, random, refused, saved, small  # noqa: F401, fixtures

import moe_zoo
from moe_zoo.checkpoints import CheckpointError, hf
from moe_zoo.checkpoints.hf import safetensors
from moe_zoo.checkpoints.hf.families import find
from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.sharding import MeshConfig, make_mesh

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
NORMS = ("norm.weight", "embed_tokens.weight", "gate.weight", "lm_head.weight", "correction_bias")


def rewrite(path, tensors):
    listed = [(name, np.dtype(a.dtype), a.shape) for name, a in tensors.items()]
    safetensors.write(path / "model.safetensors", listed, tensors.get)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """(a DeepSeek-V3 with hidden size 160 in blocks of 128, its tensors)."""
    path = tmp_path_factory.mktemp("fp8")
    given = dict(RELEASED["DeepSeek-V3"][0]) | SMALL | dict(
        hidden_size=160, intermediate_size=136, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2,
        n_group=2, topk_group=1, q_lora_rank=12, kv_lora_rank=6, qk_nope_head_dim=40, qk_rope_head_dim=2, v_head_dim=4,
        num_hidden_layers=2, first_k_dense_replace=1, rope_scaling=None,
    )  # fmt: skip
    config = find("DeepseekV3ForCausalLM", "").read(given)
    hf.save(path, random(config, ml_dtypes.bfloat16), config)
    stored, rng = safetensors.read_folder(path), np.random.default_rng(1)
    tensors = {name: np.array(safetensors.Files(stored)[name]) for name in stored}
    for name in [n for n in tensors if not n.endswith(NORMS)]:
        shape = tensors[name].shape
        tensors[name] = (rng.standard_normal(shape) * 100).astype(ml_dtypes.float8_e4m3fn)
        scales = rng.uniform(1e-4, 1e-2, (-(-shape[0] // 128), -(-shape[1] // 128)))
        tensors[f"{name}_scale_inv"] = scales.astype(np.float32)
    rewrite(path, tensors)
    config_with(path, quantization_config=FP8)
    return path, tensors


def test_blocks_of_8_bit_floats_are_read_as_what_they_say_and_written_decoded(blocks, tmp_path):
    path, tensors = blocks
    loaded = moe_zoo.load(path)
    moe_zoo.save_hf(loaded, tmp_path)
    files = safetensors.Files(safetensors.read_folder(tmp_path))
    sizes = set()
    for name in files.tensors:
        expected = tensors[name].astype(np.float32)
        if f"{name}_scale_inv" in tensors:
            rows, columns = np.indices(expected.shape)
            expected = expected * tensors[f"{name}_scale_inv"][rows // 128, columns // 128]
            sizes.add(tensors[f"{name}_scale_inv"].shape)
        np.testing.assert_array_equal(files[name], expected.astype(ml_dtypes.bfloat16), err_msg=name)
    assert sizes == {(1, 2), (2, 1), (2, 2)}
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert hf.describe(path)[0].settings["quantization_config"] == FP8


def test_scales_that_do_not_fit_are_named(blocks, tmp_path):
    path, tensors = blocks
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(tmp_path, tensors | {f"{name}_scale_inv": np.ones((1, 2), np.float32)})
    refused(tmp_path, f"{name}_scale_inv", "[1, 2]", "[2, 2]")
    rewrite(tmp_path, {n: a for n, a in tensors.items() if n != f"{name}_scale_inv"})
    refused(tmp_path, f"{name}_scale_inv", "beside it")
    config_with(tmp_path, quantization_config=...)
    refused(tmp_path, "float8_e4m3fn", "quantised")


@pytest.mark.parametrize(
    "given, words",
    [
        ({"quant_method": "gptq", "bits": 4}, ["'gptq'", "bfloat16"]),
        ({"quant_method": "awq"}, ["'awq'"]),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["'bitsandbytes'"]),
        ({}, ["None"]),
        ("fp8", ["None"]),
        (FP8 | {"weight_block_size": None}, ["weight_block_size None", "[128, 128]"]),
        (FP8 | {"fmt": "e5m2"}, ["e5m2"]),
    ],
)
def test_other_formats_are_refused_before_any_tensor_is_looked_at(folder, given, words):  # noqa: F811
    (folder / "model.safetensors").unlink()
    config_with(folder, quantization_config=given)
    refused(folder, "config.json", "quantization_config", *words)


def test_a_name_on_the_hub_is_fetched_with_what_is_read_and_nothing_else(folder, monkeypatch):  # noqa: F811
    from huggingface_hub.utils import filter_repo_objects

    wanted = {"config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"}
    there = {*wanted, "pytorch_model.bin", "modeling.py", "original/model.safetensors", "consolidated.safetensors"}

    def fetch(name, allow_patterns, ignore_patterns):
        assert name == "some/model"
        chosen = filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        assert set(chosen) == wanted
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert moe_zoo.load("some/model").published.folder == folder


def offline(*args, **kwargs):
    raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find it in the cache\nand no connection")


@pytest.mark.parametrize(
    "broken, words",
    [
        (dict(snapshot_download=offline), ["hf download some/model", "no connection"]),
        (dict(errors=None), ["pip install 'moe-zoo[hub]'"]),
    ],
)
def test_without_a_connection_or_the_library_the_way_out_is_named(broken, words, monkeypatch):
    for name, value in broken.items():
        if value is None:
            monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
        else:
            monkeypatch.setattr(huggingface_hub, name, value)
    refused("some/model", "some/model", *words)


def test_a_decoder_takes_no_second_text(folder):  # noqa: F811
    with pytest.raises(ValueError, match="decoder_input_ids.*has no encoder"):
        moe_zoo.load(folder)([[1, 2]], decoder_input_ids=[[1]])


def test_experts_that_do_not_divide_over_the_mesh_are_named_with_what_would_do(tmp_path):
    family, config = small("Qwen1.5-MoE-A2.7B")
    given = family.write(config) | {"num_experts": 6}
    config = family.read(given)
    hf.save(tmp_path, random(config), config)
    mesh = make_mesh(MeshConfig(expert=4), jax.devices()[:4])
    with pytest.raises((CheckpointError, ConfigError), match="'expert' of size 6.*size 4; sizes that do: 1, 2, 3, 6"):
        moe_zoo.load(tmp_path, mesh=mesh)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """(directory, model) of an OLMoE with experts of 40 x 24 whose channels differ in size."""
    path = tmp_path_factory.mktemp("int8")
    family, config = small("OLMoE-1B-7B")
    given = family.write(config) | dict(hidden_size=40, intermediate_size=24, head_dim=10, num_experts=8)
    config, rng = family.read(given), np.random.default_rng(2)
    model = random(config, ml_dtypes.bfloat16)
    scaled = lambda n, a: a * (0.15 * rng.uniform(0.5, 2, a.shape[-1])).astype(a.dtype) if ".experts." in n else a
    model = P.replace(model, {n: scaled(n, a) for n, a in P.arrays(model).items()})
    hf.save(path, model, config)
    return path, moe_zoo.load(path)


@pytest.mark.parametrize("mesh", [dict(), dict(fsdp=2, expert=2, tensor=2)])
def test_int8_experts_are_those_of_quantize_and_the_rest_is_as_stored(wide, mesh):
    path, loaded = wide
    devices = make_mesh(MeshConfig(**mesh), jax.devices()[:8]) if mesh else None
    before, after = P.arrays(loaded.model), P.arrays(moe_zoo.load(path, weights="int8", mesh=devices).model)
    narrowed = [n for n, a in after.items() if a.dtype == np.int8]
    assert after.keys() - before.keys() == {f"{n}_scale" for n in narrowed} and len(narrowed) == 3
    for name in before.keys() - narrowed:
        np.testing.assert_array_equal(np.asarray(after[name]), np.asarray(before[name]))
    for name in narrowed:
        exact = np.asarray(before[name], np.float32)
        scale = np.abs(exact).max(axis=-2, keepdims=True) / np.float32(127)
        np.testing.assert_array_equal(np.asarray(after[f"{name}_scale"]), scale)
        np.testing.assert_array_equal(np.asarray(after[name]), np.round(exact / scale))
        shards = after[name].addressable_shards
        assert all(s.data.size * len(shards) == after[name].size for s in shards)


def test_logits_of_int8_experts_are_close_and_the_most_likely_token_mostly_the_same(wide):
    path, loaded = wide
    ids = np.random.default_rng(0).integers(0, 48, (4, 24))
    narrow = moe_zoo.load(path, weights="int8")
    many = moe_zoo.load(path, weights="int8", mesh=make_mesh(MeshConfig(expert=2, tensor=2), jax.devices()[:4]))
    exact, *near = (np.asarray(model(ids).logits) for model in (loaded, narrow, many))
    for logits in near:
        assert 0 < np.abs(logits - exact).max() < 0.05 * exact.std()
        assert (logits.argmax(-1) == exact.argmax(-1)).mean() > 0.9
    held = P.arrays(narrow.model)
    changed = P.arrays(narrow.replace_router({"name": "top_k", "num_experts_per_tok": 1}).model)
    assert changed.keys() == held.keys() and all(changed[n] is held[n] for n in held if ".experts." in n)


def test_what_int8_cannot_do_is_said(wide, tmp_path):
    path, _ = wide
    with pytest.raises(CheckpointError, match="narrowed to int8"):
        moe_zoo.save_hf(moe_zoo.load(path, weights="int8"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="'int8', got 'int4'"):
        moe_zoo.load(path, weights="int4")
    with pytest.raises(CheckpointError, match="convert.py export"):
        moe_zoo.load(tmp_path / "run", weights="int8")
