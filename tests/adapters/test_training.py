"""Fine-tuning with adapters: what trains, what stays, what is said; the config files of configs/lora."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

import moe_zoo
from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build, to_dict
from moe_zoo.models import Decoder, ModelConfig
from moe_zoo.models.counting import count_adapters, count_parameters
from moe_zoo.sharding import MeshConfig, make_mesh
from moe_zoo.train import loop
from moe_zoo.train.config import load_config
from moe_zoo.train.step import Trainer

FILES = sorted((Path(__file__).parents[2] / "configs/lora").glob("*.py"))
BASE = {
    "vocab_size": 264, "hidden_size": 16, "layers": "1*dense 2*moe", "intermediate_size": 16, "num_experts": 4,
    "moe_intermediate_size": 8, "attention": {"num_attention_heads": 2}, "shared_expert_size": 8,
    "router": {"name": "top_k", "correction_bias": True, "bias_update_rate": 0.1},
}  # fmt: skip
SMALL = [
    ("data.seq_len", "32"), ("data.batch_size", "4"), ("data.eval_batch_size", "4"), ("log.eval_rows", "4"),
    ("log.tensorboard", "false"), ("train.steps", "3"), ("log.every", "1"), ("optim.weight_decay", "0.1"),
]  # fmt: skip


def tiny_base() -> tuple[dict, dict[str, np.ndarray]]:
    model = P.materialize(Decoder(build(ModelConfig, BASE, "model")), 0)
    return to_dict(model.config), {n: np.asarray(a) for n, a in P.arrays(model).items()}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_config_says_what_it_is_for(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for word in ("Command:", f"configs/lora/{path.name}", "Cost:", "Reaches:", "Presets:"):
        assert word in module.__doc__, word
    base = BASE | ({"layers": "3*dense"} if path.stem in ("mixlora", "same") else {})
    for arg in ("", ":tiny"):
        config = load_config(f"lora/{path.stem}{arg}", (), {"model": base, "data": {"tokenizer": "bytes"}})
        assert config.model.adapted and config.model.hidden_size == 16
        Trainer(config, make_mesh(devices=jax.devices()[:1]), config.train.objective.make())


@pytest.mark.slow  # one training run of three steps and its validation: two programs
def test_only_adapters_train_and_the_run_opens_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda config: make_mesh(devices=jax.devices()[:1]))
    settings, base = tiny_base()
    config = load_config("lora/mola:tiny", SMALL, {"model": settings})
    with pytest.raises(ConfigError, match="acts beside a trained model, .*--init-from"):
        loop.train(config, tmp_path / "none")
    run = loop.train(config, tmp_path / "run", begin_from=base)
    state, abstract = run["state"], run["trainer"].abstract
    counts, trained = count_adapters(abstract), count_parameters(abstract)["trainable"]
    assert counts["matched"] == 12 and counts["linear"] == 12 + 9 + 6
    said = " ".join(capsys.readouterr().out.split())
    assert f"adapters mola beside 12 of 27 linear layers: {trained:,} parameters train" in said
    assert "moments" in said and "expert_load" in (tmp_path / "run/metrics.jsonl").read_text()
    # bit for bit, weight decay and the balancing bias of the base's routers included
    assert set(base) == {n for n in state["frozen"] if ".adapters." not in n} and not state["buffers"]
    for name, value in base.items():
        np.testing.assert_array_equal(state["frozen"][name], value, err_msg=name)
    moments = [leaf.shape for leaf in jax.tree.leaves(state["opt"]) if leaf.ndim]
    shapes = [value.shape for value in state["trainable"].values()]
    assert sorted(moments) == sorted(2 * shapes) and all(".adapters." in n for n in state["trainable"])
    assert all(np.abs(v).max() > 0 for n, v in state["trainable"].items() if n.endswith(".b"))
    loaded = moe_zoo.load(tmp_path / "run")
    assert loaded.config.adapters.name == "mola"
    for name, value in P.arrays(loaded.model).items():
        np.testing.assert_array_equal(value, {**state["frozen"], **state["trainable"]}[name])


@pytest.mark.slow  # two train steps are compiled, one of them for four devices
@pytest.mark.parametrize("name", ["mola", "mos", "glider"])
def test_a_step_on_a_mesh_is_the_step_on_one_device(name):
    settings, base = tiny_base()
    adapters = [("data.seq_len", "8"), ("data.batch_size", "4")]
    adapters += [("model.adapters.router_aux_loss_coef", "1.0")] if name == "mola" else []
    config = load_config(f"lora/{name}:tiny", adapters, {"model": settings})
    ids = np.random.default_rng(0).integers(0, 256, (4, 9)).astype(np.int32)
    batch = {
        "tokens": ids[:, :-1], "targets": ids[:, 1:], "segment_ids": np.ones((4, 8), np.int32),
        "positions": np.tile(np.arange(8, dtype=np.int32), (4, 1)), "domain": np.zeros((4, 8), np.int32),
        "loss_mask": np.ones((4, 8), bool),
    }  # fmt: skip
    losses, gradients = [], []
    for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])):
        trainer = Trainer(config, mesh, config.train.objective.make())
        state = trainer.init_state(given=base)
        for group in ("trainable", "frozen"):  # B begins at zero, and then gates have no gradient
            for key, value in state[group].items():
                if key.endswith((".b", ".shards_b")) and not np.asarray(value).any():
                    draw = np.random.default_rng(len(key)).normal(size=value.shape).astype(value.dtype) / 4
                    state[group][key] = jax.device_put(draw, value.sharding)
        _, stats = trainer.train_step(state, batch, np.float32(0))
        losses.append({key: float(value) for key, value in stats["scalars"].items()})
        gradients.append(stats["gradient_norms"])
    assert name != "mola" or losses[0]["router_loss"] > 1
    for key, value in losses[0].items():
        np.testing.assert_allclose(losses[1][key], value, rtol=1e-4, atol=1e-6, err_msg=key)
    norms = jax.tree.leaves(gradients[0])
    assert norms and all(np.all(norm > 0) for norm in norms)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), *gradients)


def test_the_files_adapters_go_onto_the_given_model_and_overrides_onto_them():
    settings, _ = tiny_base()
    config = load_config("lora/lora:tiny", [("model.adapters.r", "2")], {"model": settings})
    assert config.model.layers == BASE["layers"] and config.model.adapters.config.r == 2
    assert config.model.adapters.config.lora_alpha == 8.0
    other = load_config("lora/lora:tiny", [("model.adapters.name", "hydralora")], {"model": settings})
    assert other.model.adapters.name == "hydralora" and other.model.adapters.config.r == 4


@pytest.mark.parametrize("settings, message", [
    ({"target_modules": ["self_attn.q_proj"]}, r"'self_attn.q_proj' matches no linear layer \(did you mean 'q'\?\)"),
    ({"target_modules": ["mixer.*", "ffn.w_gat"]}, r"did you mean 'ffn.w_gate'.*there are ffn.experts.w_down, "),
    ({"layers_to_transform": [3]}, "layers_to_transform: 3; the model has layers 0 to 2"),
    ({"rank_pattern": {"mixer.z": 2}}, "rank_pattern: 'mixer.z' matches no linear layer"),
    ({"name": "mola", "experts_by_depth": [1, 2]}, "experts_by_depth: 1 experts, num_experts_per_tok=2 of them"),
    ({"name": "loar"}, "unknown adapter 'loar' .did you mean 'lora'"),
    ({"rank": 2}, "unknown key 'model.adapters.rank'"),
])  # fmt: skip
def test_mistakes_are_named_before_anything_is_made(settings, message):
    with pytest.raises(ConfigError, match=message):
        Decoder(build(ModelConfig, {**BASE, "adapters": {"name": "lora", **settings}}, "model"))


def test_parameters_are_counted_as_far_as_they_move():
    def count(**adapters):
        model = Decoder(build(ModelConfig, {**BASE, "adapters": adapters}, "model"))
        return count_adapters(model) | {"trainable": count_parameters(model)["trainable"]}

    D, F = 16, 16
    plain = count(name="lora", target_modules=["mixer.q", "ffn.w_up"], r=4)
    assert plain == {"linear": 27, "matched": 4, "trainable": 4 * (3 * 2 * D + D + F)}
    fewer = count(name="lora", target_modules=["mixer.q"], layers_to_transform=[2], r=4, rank_pattern={"layers.1.*": 8})
    assert fewer == {"linear": 27, "matched": 1, "trainable": 4 * 2 * D}
    mola = count(name="mola", target_modules=["mixer.q"], r=1, experts_by_depth=[2, 3, 4])
    assert mola["trainable"] == (2 + 3 + 4) * 3 * D
    assert count(name="lora", use_dora=True, target_modules=["mixer.q"], r=1)["trainable"] == 3 * 3 * D
