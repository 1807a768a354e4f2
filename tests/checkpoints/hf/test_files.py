"""Directories without torch: out and in again bit by bit, and every kind of bad input as one line before allocation."""

import json
import re
import shutil
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
import references
from released import RELEASED

import moe_zoo
from moe_zoo.checkpoints import CheckpointError, hf
from moe_zoo.checkpoints.hf import layout, memory, safetensors, writing
from moe_zoo.checkpoints.hf.families import find
from moe_zoo.core import param as P
from moe_zoo.models import make_model
from moe_zoo.sharding import MeshConfig, make_mesh

SMALL = dict(
    vocab_size=48, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=4, num_hidden_layers=3
)
SMALLER = dict(
    intermediate_size=12, moe_intermediate_size=8, shared_expert_intermediate_size=8, first_k_dense_replace=1,
    rotary_dim=2, rope_scaling=None, num_dense_layers=1, n_group=2, topk_group=1, global_attn_every_n_layers=3,
    sliding_window_pattern="LLG", moe_topk=2, num_shared_expert=1, intermediate_size_mlp=20, no_rope_layer_interval=3,
    attention_chunk_size=4, d_model=16, n_heads=4, n_layers=3, attn_config=dict(kv_n_heads=2, clip_qkv=8),
    ffn_config=dict(ffn_hidden_size=8, moe_num_experts=4, moe_top_k=2), num_layers=2, ffn_hidden_size=20,
    expert_ffn_hidden_size=8, zero_expert_num=3, kv_channels=4, partial_rotary_factor=0.5, full_attention_interval=2,
    attn_layer_period=3, attn_layer_offset=1, shared_intermediate_size=8, moe_shared_expert_intermediate_size=8,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=6, linear_value_head_dim=3, mamba_n_heads=4,
    mamba_d_head=8, mamba_d_state=3, mamba_num_heads=4, mamba_head_dim=6, n_groups=2, ssm_state_size=5, mamba_dt_rank=2,
    hybrid_override_pattern="ME*", num_experts_per_token=2, moe_layer_interval=2, d_kv=4, d_ff=12, num_heads=4,
    num_decoder_layers=4,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=2, encoder_sparse_step=2, decoder_sparse_step=2,
    encoder_layers=2, decoder_layers=4, encoder_ffn_dim=12, decoder_ffn_dim=8, encoder_attention_heads=4,
    decoder_attention_heads=2,
    linear_attn_config={"full_attn_layers": [2], "num_heads": 2, "head_dim": 6, "short_conv_kernel_size": 4},
)  # fmt: skip
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def small(name):
    """(family, settings) of a released model, every size cut down."""
    given = dict(RELEASED[name][0])
    given |= SMALL | {k: v for k, v in SMALLER.items() if k in given}
    if "kv_lora_rank" in given:
        given |= dict(kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4, n_group=2, topk_group=1)
        given["q_lora_rank"] = given["q_lora_rank"] and 5
    if "num_shared_expert" in given:
        given["moe_intermediate_size"] = given["intermediate_size"]
    if "layer_types" in given:
        given["layer_types"] = sorted(set(given["layer_types"])) + given["layer_types"][:1]
    near = 4 if {"global_attn_every_n_layers", "sliding_window_pattern"} & given.keys() else None
    given |= {k: 4 for k in EXPERTS if k in given} | {"num_experts_per_tok": 2, "sliding_window": near}
    family = find(given["architectures"][0], "config.json")
    return family, family.read(given)


def random(config, dtype=np.float32):
    """A model whose every number is another one."""
    rng = np.random.default_rng(0)
    model = make_model(config, make_mesh(devices=jax.devices()[:1]))
    draw = lambda a: jax.numpy.asarray(rng.standard_normal(a.shape).astype(dtype))
    return P.replace(model, {name: draw(a) for name, a in P.arrays(model).items()})


@pytest.mark.parametrize("name", RELEASED)
def test_random_numbers_come_back_bit_by_bit(name, tmp_path):
    _, config = small(name)
    model = random(config)
    hf.save(tmp_path, model, config)
    loaded = moe_zoo.load(tmp_path)
    before, after = P.arrays(model), P.arrays(loaded.model)
    assert before.keys() == after.keys()
    for path in before:
        np.testing.assert_array_equal(before[path], after[path], err_msg=path)
    if name in ("OLMoE-1B-7B", "gpt-oss-20b", "DeepSeek-V3", "Llama-4-Scout, text"):
        assert np.isfinite(loaded(np.arange(6)[None]).logits).all()


@pytest.mark.parametrize("name", references.TINY)
def test_what_transformers_has_no_class_for_agrees_with_an_independent_reference(name, tmp_path):
    references.save(name, tmp_path)
    loaded, ids = moe_zoo.load(tmp_path), references.IDS
    logits, experts = references.logits(name, ids)
    out = loaded(ids[None], return_routing=True)
    np.testing.assert_allclose(out.logits[0], logits, rtol=0, atol=2e-4)
    assert [np.sort(a, -1).tolist() for a in out.aux.stats["router_experts"]] == experts
    assert len(np.unique(experts)) > 5 and np.abs(logits).max() > 0.1
    if name in (golden := references.golden()):
        np.testing.assert_allclose(out.logits[0, -4:], golden[name], rtol=0, atol=2e-4)
    cache = loaded.model.init_cache(1, 12)
    for part in (ids[:6], ids[6:]):
        rows, _, cache = loaded.model(part[None], cache=cache)
    np.testing.assert_allclose(rows[0], logits[6:], rtol=0, atol=2e-4)
    moe_zoo.save_hf(loaded, tmp_path / "out")
    written = safetensors.Files(safetensors.read_folder(tmp_path / "out"))
    expected = references.tensors(name)
    assert written.tensors.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(written[path], array)
    assert json.loads((tmp_path / "out/config.json").read_text()) == references.TINY[name]


def test_the_text_model_is_taken_out_of_one_that_also_sees_and_written_alone(tmp_path):
    _, config = small("Llama-4-Scout, text")
    model = random(config)
    hf.save(tmp_path / "text", model, config)
    given = json.loads((tmp_path / "text/config.json").read_text())
    given = {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "text_config": given}
    files = safetensors.Files(safetensors.read_folder(tmp_path / "text"))
    tensors = {f"language_model.{name}": files[name] for name in files.tensors}
    tensors["vision_model.patch_embedding.linear.weight"] = np.ones((3, 4), np.float32)
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/config.json").write_text(json.dumps(given))
    listed = [(name, array.dtype, array.shape) for name, array in tensors.items()]
    safetensors.write(tmp_path / "whole/model.safetensors", listed, tensors.get)
    loaded = moe_zoo.load(tmp_path / "whole")
    before, after = P.arrays(model), P.arrays(loaded.model)
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    moe_zoo.save_hf(loaded, tmp_path / "out")
    assert (tmp_path / "out/config.json").read_bytes() == (tmp_path / "text/config.json").read_bytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small Mixtral, in one file and in several."""
    folder, (_, config) = tmp_path_factory.mktemp("saved"), small("Mixtral-8x7B")
    model = random(config)
    hf.save(folder / "one", model, config)
    writing.save(folder / "several", model, config, shard_bytes=8000)
    assert len(list((folder / "several").glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """It in one file, to be damaged."""
    return shutil.copytree(saved / "one", tmp_path, dirs_exist_ok=True)


@pytest.fixture
def shards(saved, tmp_path):
    """It in several files."""
    return shutil.copytree(saved / "several", tmp_path, dirs_exist_ok=True)


def refused(path, *words):
    with pytest.raises(CheckpointError) as error:
        moe_zoo.load(path)
    text = str(error.value)
    assert all(word in text for word in words) and "\n" not in text, text


def config_with(folder, **changes):
    path = folder / "config.json"
    given = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in given.items() if v is not ...}))


def header_with(path, change):
    """Rewrites a file with its header changed by `change(header)`."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    text = change(header) or json.dumps(header)
    path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + raw[8 + size :])


NAME = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


def test_a_file_that_was_cut_short_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    refused(folder, "model.safetensors", "truncated", "tensor")
    path.write_bytes(b"\x10\0")
    refused(folder, "model.safetensors", "truncated")
    path.write_bytes(b"")
    refused(folder, "model.safetensors", "truncated")


def test_a_file_that_is_too_long_is_named(folder):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"xyz")
    refused(folder, "model.safetensors", "3 bytes after")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda h: h[NAME].update(shape=[16, 13]), [NAME, "[16, 13]", "bytes"]),
        (lambda h: h[NAME].update(shape=[-16, -12]), [NAME, "whole numbers"]),
        (lambda h: h[NAME].update(shape="ab"), [NAME, "whole numbers"]),
        (lambda h: h[NAME].update(shape=[12, 16]), [NAME, "[12, 16]", "[16, 12]"]),
        (lambda h: h[NAME].update(dtype="F16"), [NAME, "F16", "bytes"]),
        (lambda h: h[NAME].update(dtype="F17"), [NAME, "F17", "known"]),
        (lambda h: h[NAME].update(data_offsets=[0, 768]), ["overlaps"]),
        (lambda h: h[NAME].update(data_offsets=[10**12, 10**12 + 768]), ["gap", "end to end"]),
        (lambda h: h[NAME].update(data_offsets=[768]), [NAME, "data_offsets"]),
        (lambda h: h.update({NAME: 3}), [NAME, "data_offsets"]),
        (lambda h: h.pop(NAME) and None, ["gap"]),
        (lambda h: h.update({NAME.replace("w2", "w9"): h.pop(NAME)}), [NAME, "missing"]),
        (lambda h: h.update(extra={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}), ["'extra'", "no parameter"]),
        (lambda h: "[1]", ["JSON header"]),
        (lambda h: "{nonsense", ["JSON header"]),
        (lambda h: "[" * 5000, ["JSON header"]),
        (lambda h: '{"a": 1, "a": 2}', ["'a' twice"]),
    ],
)
def test_a_header_that_lies_is_caught(folder, change, words):
    header_with(folder / "model.safetensors", change)
    refused(folder, "model.safetensors" if "missing" not in words else str(folder), *words)


def test_integers_are_no_weights(folder):
    header_with(folder / "model.safetensors", lambda h: h[NAME].update(dtype="I32"))
    refused(folder, NAME, "int32", "quantised")


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(hidden_size=32), ["config.json", "shape"]),
        (dict(vocab_size=49), ["model.embed_tokens.weight", "[48, 16]", "[49, 16]"]),
        (dict(num_hidden_layers=4), ["model.layers.3", "missing"]),
        (dict(num_hidden_layers=2), ["model.layers.2", "no parameter"]),
        (dict(num_local_experts=5), ["experts.4", "missing"]),
        (dict(tie_word_embeddings=True), []),
        (dict(num_experts_per_tok=9), ["config.json", "num_experts_per_tok", "9"]),
        (dict(num_hidden_layers="3"), ["config.json", "num_hidden_layers"]),
        (dict(num_hidden_layers=...), ["config.json", "num_hidden_layers"]),
        (dict(hidden_size=...), ["config.json", "hidden_size"]),
        (dict(hidden_act="mish"), ["config.json", "mish", "silu"]),
        (dict(num_attention_heads=0), ["config.json"]),
        (dict(rope_parameters={"rope_type": "dynamic"}), ["dynamic", "yarn"]),
        (dict(architectures=["MixtralForCausalLN"]), ["MixtralForCausalLN", "did you mean 'MixtralForCausalLM'"]),
        (dict(architectures=[]), ["architectures"]),
        (dict(architectures=["Glm4MoeLiteForCausalLM"]), ["Glm4MoeLite", "transformers has", "nearest is Glm4MoeFor"]),
    ],
)
def test_numbers_that_contradict_the_tensors_are_named(folder, changes, words):
    config_with(folder, **changes)
    if words:
        refused(folder, *words)
    else:  # a tied head is stored twice in some files; the second is not looked at
        moe_zoo.load(folder)


def test_a_missing_shard_and_an_index_that_lies(shards):
    index = json.loads((shards / safetensors.INDEX).read_text())
    file = index["weight_map"][NAME]
    others = [f for f in set(index["weight_map"].values()) if f != file]
    moved = {**index["weight_map"], NAME: others[0]}
    (shards / safetensors.INDEX).write_text(json.dumps({"weight_map": moved}))
    refused(shards, NAME, safetensors.INDEX)
    (shards / safetensors.INDEX).write_text(json.dumps({"weight_map": {**index["weight_map"], "gone": file}}))
    refused(shards, "'gone'", file)
    (shards / safetensors.INDEX).write_text(json.dumps(index))
    moe_zoo.load(shards)
    (shards / file).unlink()
    refused(shards, file, "missing", safetensors.INDEX)


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..\\m.safetensors", "C:m.safetensors", "m.bin", 3],
)
def test_an_index_may_only_name_files_beside_it(shards, file):
    index = json.loads((shards / safetensors.INDEX).read_text())
    index["weight_map"][NAME] = file
    (shards / safetensors.INDEX).write_text(json.dumps(index))
    refused(shards, safetensors.INDEX, repr(file), "beside it")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "\x00"])
def test_an_index_that_is_none(shards, text):
    (shards / safetensors.INDEX).write_text(text)
    refused(shards, safetensors.INDEX)


def test_pickle_files_are_refused_with_the_way_out(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo hi'\ntR.")
    refused(folder, "pytorch_model.bin", "pickle", "run code", "save_pretrained")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "no weights", "model.safetensors")


def test_nothing_is_allocated_before_all_is_checked(folder, monkeypatch):
    header_with(folder / "model.safetensors", lambda h: h.update({NAME.replace("w2", "w9"): h.pop(NAME)}))
    monkeypatch.setattr(jax, "make_array_from_callback", lambda *a, **k: pytest.fail("allocated"))
    refused(folder, NAME)


def test_what_no_family_has_is_named_and_nothing_is_written(folder, tmp_path):
    loaded = moe_zoo.load(folder)
    loaded.replace_router("switch")
    with pytest.raises(CheckpointError, match=r"MixtralForCausalLM.*model\.router\.name=switch"):
        moe_zoo.save_hf(loaded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_router_keeps_what_fits_and_changes_the_routes(folder):
    loaded, ids = moe_zoo.load(folder), np.arange(12).reshape(2, 6)
    kernel = P.arrays(loaded.model)["segments.0.blocks.0.ffn.router.kernel"]
    before = loaded(ids, return_routing=True)
    after = loaded.replace_router({"name": "top_k", "num_experts_per_tok": 1})(ids, return_routing=True)
    assert P.arrays(loaded.model)["segments.0.blocks.0.ffn.router.kernel"] is kernel
    assert [a.shape for a in after.aux.stats["router_experts"]] == [(12, 1)] * 3
    np.testing.assert_array_equal(before.aux.stats["router_logits"][0], after.aux.stats["router_logits"][0])
    loaded.replace_router({"name": "hash"})
    assert loaded(ids, return_routing=True).logits.shape == (2, 6, 48)


def test_bfloat16_files_stay_bfloat16_and_buffers_what_they_were(tmp_path):
    _, config = small("GLM-4.5")
    model = random(config, ml_dtypes.bfloat16)
    name = next(n for n in P.arrays(model) if n.endswith("router.correction"))
    model = P.replace(model, P.arrays(model) | {name: P.arrays(model)[name].astype(np.float32)})
    hf.save(tmp_path, model, config)
    for dtype, expected in ((None, "bfloat16"), ("float32", "float32")):
        loaded = moe_zoo.load(tmp_path, dtype=dtype)
        kinds = {n: a.dtype.name for n, a in P.arrays(loaded.model).items()}
        assert kinds.pop(name) == "float32" and set(kinds.values()) == {expected} and loaded.config.dtype == expected


def test_a_name_that_is_no_directory_and_not_on_the_hub_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_zoo.checkpoints.hf.download", lambda name: (_ for _ in ()).throw(CheckpointError("off")))
    with pytest.raises(CheckpointError, match="off"):
        moe_zoo.load("some/model")
    with pytest.raises(CheckpointError, match="not a run"):
        moe_zoo.load(tmp_path)


@pytest.mark.parametrize(
    "stored, ours",
    [
        (layout.Stored("x"), (5, 3)),
        (layout.Stored("x", "row"), (7,)),
        (layout.linear("x"), (4, 2, 3)),
        (layout.linear("x", inputs=2), (2, 3, 4)),
        (layout.linear("x", batched=True, part=1, parts=2), (3, 4, 70)),
        (layout.linear("x", batched=True, part=1, parts=2, interleaved=True), (3, 4, 6)),
        (layout.Stored("x", part=0, parts=2, interleaved=True), (3, 4, 6)),
    ],
)
def test_reading_undoes_writing(stored, ours):
    leaf = np.random.default_rng(0).standard_normal(ours)
    published = np.zeros(stored.shape(ours))
    stored.put(published, leaf)
    np.testing.assert_array_equal(stored.ours(published, ours), leaf)
    assert (published != 0).sum() == leaf.size
    out = np.empty(ours)
    layout.copy_into(out, stored.ours(published, ours))
    np.testing.assert_array_equal(out, leaf)


VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_four_bit_experts_are_read_as_what_they_say_and_written_decoded(tmp_path):
    rng = np.random.default_rng(0)
    given = dict(RELEASED["gpt-oss-20b"][0]) | SMALL
    given |= dict(hidden_size=32, intermediate_size=64, num_local_experts=3, num_experts_per_tok=2, num_hidden_layers=2)
    config = find("GptOssForCausalLM", "").read(given)
    hf.save(tmp_path, random(config, ml_dtypes.bfloat16), config)
    # copied: the file behind a view must not be written over
    stored = safetensors.read_folder(tmp_path)
    tensors = {n: np.array(safetensors.Files(stored)[n]) for n in stored}
    expected = {}
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        E, rows, cols = tensors.pop(name).shape
        codes = rng.integers(0, 16, (E, cols, rows // 32, 32), np.uint8)
        tensors[f"{name}_scales"] = rng.integers(120, 130, codes.shape[:-1], np.uint8)
        tensors[f"{name}_blocks"] = codes[..., ::2] | (codes[..., 1::2] << 4)
        signed = np.array([*VALUES, *[-v for v in VALUES]])[codes]
        numbers = signed * 2.0 ** (tensors[f"{name}_scales"].astype(float) - 127)[..., None]
        expected[name] = numbers.reshape(E, cols, rows).transpose(0, 2, 1)
    safetensors.write(tmp_path / "model.safetensors", [(n, a.dtype, a.shape) for n, a in tensors.items()], tensors.get)
    moe_zoo.save_hf(moe_zoo.load(tmp_path), tmp_path / "out")
    files = safetensors.Files(safetensors.read_folder(tmp_path / "out"))
    assert len(expected) == 4
    for name, numbers in expected.items():
        np.testing.assert_array_equal(files[name].astype(float), numbers)
    narrow = P.arrays(moe_zoo.load(tmp_path, weights="int8").model)
    for layer in range(2):
        numbers = expected[f"model.layers.{layer}.mlp.experts.down_proj"]
        down = f"segments.{layer}.blocks.0.ffn.experts.w_down"
        near = np.asarray(narrow[down], float) * np.asarray(narrow[f"{down}_scale"])
        np.testing.assert_allclose(near[0], numbers, rtol=0, atol=np.abs(numbers).max() / 250)
    tensors.pop(f"{name}_scales")
    safetensors.write(tmp_path / "model.safetensors", [(n, a.dtype, a.shape) for n, a in tensors.items()], tensors.get)
    refused(tmp_path, f"{name}_blocks", "scales")


def test_messages_name_the_file_in_full(folder):
    header_with(folder / "model.safetensors", lambda h: h[NAME].update(shape=[12, 16]))
    refused(folder, str(folder / "model.safetensors"))
    assert re.search(r"\.safetensors", str(folder / "model.safetensors"))


@pytest.mark.parametrize("mesh", [dict(), dict(fsdp=2, expert=2, tensor=2)])
def test_what_is_read_is_not_copied_again_and_what_devices_share_is_read_once(folder, mesh, monkeypatch):
    given, allocate = [], memory.empty
    monkeypatch.setattr(memory, "empty", lambda *a: given.append(allocate(*a)) or given[-1])
    devices = make_mesh(MeshConfig(**mesh), jax.devices()[:8]) if mesh else None
    arrays = P.arrays(moe_zoo.load(folder, mesh=devices).model).values()
    held = {s.data.unsafe_buffer_pointer() for a in arrays for s in a.addressable_shards}
    assert {a.ctypes.data for a in given} == held
    assert sum(a.nbytes for a in given) == sum(a.nbytes for a in arrays)
