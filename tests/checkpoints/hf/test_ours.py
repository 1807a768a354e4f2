"""Directories in our own format: any model, bit by bit, and what is wrong with one as a line."""

import json
import sys
import types

import jax
import numpy as np
import pytest

import moe_zoo
from moe_zoo.checkpoints import CheckpointError, Checkpoints
from moe_zoo.checkpoints.hf import safetensors
from moe_zoo.cli import common
from moe_zoo.cli.convert import convert
from moe_zoo.core import param as P
from moe_zoo.core.schema import to_dict
from moe_zoo.data.tokenizer import load_tokenizer
from moe_zoo.models import Decoder
from moe_zoo.sharding import MeshConfig, make_mesh
from moe_zoo.train.config import load_config
from moe_zoo.transform import add_adapters, merge

IDS = np.arange(20).reshape(2, 10)
#: each with something that no published model has: a table of ids, single numbers, what all layers share, a chain,
#: ranks that differ, a second pass
ODD = ("hash", "top_p", "rmoe", "pre_gate", "modality_groups", "chain_of_experts", "smoe_dropout", "hybrid",
       "deepseek_v3", "lora/mola", "lora/xlora")  # fmt: skip


def made(name, changes=()):
    """A model of a config with every number another one, its settings, and no training."""
    config = load_config(f"{name}:tiny", list(changes)).model
    model = P.materialize(Decoder(config, make_mesh(devices=jax.devices()[:1])), 0)
    rng = np.random.default_rng(0)

    def draw(a):
        floats = jax.numpy.issubdtype(a.dtype, jax.numpy.floating)
        return rng.normal(0, 0.3, a.shape).astype(a.dtype) if floats else rng.integers(0, 4, a.shape, a.dtype)

    model = P.replace(model, {path: jax.numpy.asarray(draw(a)) for path, a in P.arrays(model).items()})
    return moe_zoo.Loaded(model, config, load_tokenizer("bytes"))


def same(one, other):
    a, b = P.arrays(one.model), P.arrays(other.model)
    assert a.keys() == b.keys() and other.config == one.config
    for path in a:
        assert a[path].dtype == b[path].dtype
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.mark.parametrize("name", ODD)
def test_any_model_comes_back_bit_by_bit_with_its_settings(name, tmp_path):
    loaded = made(name)
    moe_zoo.save(loaded, tmp_path)
    again = moe_zoo.load(tmp_path)
    same(loaded, again)
    assert again.tokenizer_spec == "bytes" and again.tokenizer is not None
    names = {name for names in P.layer_names(loaded.model).values() for name in names}
    assert safetensors.read_folder(tmp_path).keys() == names


@pytest.fixture(scope="module")
def remoe(tmp_path_factory):
    """(a ReMoE, which no published family has; its directory)."""
    loaded, folder = made("remoe"), tmp_path_factory.mktemp("remoe")
    moe_zoo.save(loaded, folder)
    return loaded, folder


def test_it_computes_the_same_and_lies_on_a_mesh_as_it_would(remoe):
    loaded, folder = remoe
    with pytest.raises(CheckpointError, match="no published family.*router.name=relu.*; moe_zoo.save writes it"):
        moe_zoo.save_hf(loaded, folder / "out")
    logits = np.asarray(loaded(IDS).logits)
    np.testing.assert_array_equal(moe_zoo.load(folder)(IDS).logits, logits)
    many = moe_zoo.load(folder, mesh=make_mesh(MeshConfig(fsdp=2, expert=4), jax.devices()[:8]))
    same(loaded, many)
    experts = P.arrays(many.model)["segments.0.blocks.0.ffn.experts.w_up"]
    assert experts.addressable_shards[0].data.size * 8 == experts.size


def test_types_are_kept_unless_another_is_asked_for_and_ids_always(tmp_path):
    loaded = made("hash", [("model.dtype", "bfloat16")])
    moe_zoo.save(loaded, tmp_path)
    again, low = moe_zoo.load(tmp_path), moe_zoo.load(tmp_path, dtype="bfloat16")
    kinds = lambda one: {a.dtype.name for path, a in P.arrays(one.model).items() if not path.endswith("table")}
    ids = "segments.0.blocks.0.ffn.router.table"
    assert again.config.dtype == low.config.dtype == "bfloat16"
    assert kinds(again) == {"float32"} and kinds(low) == {"bfloat16"}
    np.testing.assert_array_equal(P.arrays(low.model)[ids], P.arrays(loaded.model)[ids])


def test_a_run_goes_out_and_its_ids_stay_ids(tmp_path):
    loaded = made("hash")
    checkpoints, groups = Checkpoints(tmp_path / "run"), {"trainable": {}, "frozen": {}, "buffers": {}}
    for path, var in P.flat(loaded.model).items():
        groups["frozen" if isinstance(var, P.Frozen) else "trainable"][path] = var.get_value()
    checkpoints.save_params(0, groups)
    checkpoints.close()
    settings = {"model": to_dict(loaded.config), "data": {"tokenizer": "bytes"}}
    (tmp_path / "run/config.json").write_text(json.dumps(settings))
    moe_zoo.save(moe_zoo.load(tmp_path / "run"), tmp_path / "out")
    same(loaded, moe_zoo.load(tmp_path / "out"))
    low = P.arrays(moe_zoo.load(tmp_path / "run", dtype="bfloat16").model)
    assert low["segments.0.blocks.0.ffn.router.table"].dtype == np.int32
    assert low["segments.0.blocks.0.ffn.experts.w_up"].dtype == jax.numpy.bfloat16


def test_adapters_go_along_or_are_merged_before(remoe, tmp_path):
    loaded, _ = remoe
    adapted = add_adapters(loaded, {"name": "lora", "r": 2, "target_modules": ["mixer.q"]}, seed=1)
    adapted.model = P.replace(adapted.model, {n: a + 0.1 for n, a in P.arrays(adapted.model).items()})
    for one, folder in ((adapted, "beside"), (merge(adapted), "merged")):
        moe_zoo.save(one, tmp_path / folder)
        same(one, moe_zoo.load(tmp_path / folder))


def test_a_directory_of_ours_goes_on_to_transformers_if_there_is_a_class(tmp_path, capsys):
    loaded = made("quickstart")
    moe_zoo.save(loaded, tmp_path / "ours")
    run = lambda *argv: common.run(convert, [str(a) for a in argv])
    assert run("inspect", tmp_path / "ours") == 0 and run("export", tmp_path / "ours", f"--out={tmp_path / 'hf'}") == 0
    assert "MixtralForCausalLM" in capsys.readouterr().out
    given = json.loads((tmp_path / "hf/config.json").read_text())
    assert given["architectures"] == ["MixtralForCausalLM"] and given["eos_token_id"] == 258
    assert run("export", tmp_path / "hf", f"--out={tmp_path / 'back'}", "--format=moe_zoo") == 0
    a, b = (P.arrays(moe_zoo.load(tmp_path / path).model) for path in ("ours", "back"))
    assert all(np.array_equal(a[path], b[path]) for path in a)
    assert run("inspect", tmp_path / "hf", "--format=moe_zoo") == 2
    assert "--format" in capsys.readouterr().err


def refused(folder, model, words):
    (folder / "config.json").write_text(json.dumps({"architectures": ["MoeZooForCausalLM"], **model}))
    with pytest.raises(CheckpointError, match=words) as error:
        moe_zoo.load(folder)
    assert "\n" not in str(error.value)


def test_what_is_wrong_with_one_is_a_line(remoe, tmp_path):
    _, folder = remoe
    model = json.loads((folder / "config.json").read_text())["model"]
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    refused(tmp_path, {}, "config.json: it has no section 'model'")
    refused(tmp_path, {"model": [1]}, "config.json: it has no section 'model'")
    refused(
        tmp_path, {"model": model | {"hiden_size": 3}}, "config.json: unknown key 'model.hiden_size'.*'hidden_size'"
    )
    refused(tmp_path, {"model": model | {"num_experts": 5}}, "experts.w_down.*config.json makes it.*5")
    refused(tmp_path, {"model": model | {"router": {"name": "hash"}}}, "router.table.*missing")
    refused(
        tmp_path, {"model": model | {"router": {"name": "relu", "k": 3}}}, "config.json: unknown key 'model.router.k'"
    )


def test_a_file_does_not_decide_what_is_imported(remoe, tmp_path, monkeypatch):
    _, folder = remoe
    model = json.loads((folder / "config.json").read_text())["model"]
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for changed in ({"router": {"name": "my_idea:Mine"}}, {"losses": {"my_idea:Mine": {}}}):
        refused(tmp_path, {"model": model | changed}, "'my_idea:Mine' is a class.*import my_idea first")
    from moe_zoo.routing.relu import ReLU

    module = types.ModuleType("my_idea")
    module.Mine = type("Mine", (ReLU,), {})
    monkeypatch.setitem(sys.modules, "my_idea", module)
    router = {**model["router"], "name": "my_idea:Mine"}
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["MoeZooForCausalLM"], "model": model | {"router": router}})
    )
    assert moe_zoo.load(tmp_path).config.router.cls is module.Mine
