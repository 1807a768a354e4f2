"""DeepSeekMoE-16B and OpenMoE: logits that are kept, what is lost where experts are full, settings of theirs alone."""

import re

import numpy as np
import pytest
import reference_openmoe
import references
from references import IDS, TINY

import moe_zoo
from moe_zoo.checkpoints import CheckpointError
from moe_zoo.checkpoints.hf.families import find
from moe_zoo.checkpoints.hf.family import expand, look_up
from moe_zoo.core.schema import build, overlay, to_dict
from moe_zoo.models import ModelConfig

GOLDEN = references.golden()


@pytest.mark.parametrize("name", GOLDEN)
def test_the_reference_says_what_it_said_and_every_tensor_has_a_part_in_it(name):
    c, w = TINY[name], {path: a.astype(np.float64) for path, a in references.tensors(name).items()}
    run = lambda w: references.module(name).logits(c, w, IDS)
    logits, chosen = run(w)
    np.testing.assert_allclose(logits[-4:], GOLDEN[name], rtol=0, atol=1e-5)
    routed = [f"model.layers.{i}" for i in range(c["num_hidden_layers"]) if f"model.layers.{i}.mlp.gate.weight" in w]
    busy = {f"{at}.mlp.experts.{e}" for at, rows in zip(routed, chosen) for row in rows for e in row}
    moved = 0
    for path in w:
        expert = re.match(r".*\.experts\.\d+(?=\.)", path)
        if expert is None or expert[0] in busy:
            assert np.abs(run({**w, path: 1.5 * w[path]})[0] - logits).max() > 1e-6, path
            moved += 1
    assert moved > 0.8 * len(w)


def test_what_openmoe_loses_where_experts_are_full_is_lost_here_too_if_asked_for(tmp_path):
    c = TINY["openmoe"]
    references.save("openmoe", tmp_path)
    loaded, places = moe_zoo.load(tmp_path), reference_openmoe.places(c, len(IDS))
    whole, everyone = references.logits("openmoe", IDS)
    logits, reached = references.logits("openmoe", IDS, places=places)
    lost = [len(IDS) * 2 - sum(map(len, rows)) for rows in reached]
    assert places == 4 and min(lost) > 0 and np.abs(logits - whole).max() > 0.1
    drops = {
        "name": "capacity", "capacity_factor": c["router_capacity_factor_train"], "rounding": "even",
        "eval_capacity_factor": c["router_capacity_factor_eval"], "min_capacity": c["router_min_capacity"],
    }  # fmt: skip
    loaded.replace_router(to_dict(loaded.config)["router"], dispatch=drops)
    out = loaded(IDS[None])
    np.testing.assert_allclose(out.logits[0], logits, rtol=0, atol=2e-4)
    shares = [float(stats["dropped_fraction"].value().sum()) for stats in out.aux.stats.values() if stats]
    assert sum(shares) == pytest.approx(sum(lost) / (2 * len(IDS)))


@pytest.mark.parametrize(
    "name, changes, path, value",
    [
        ("deepseek", dict(moe_layer_freq=2, num_hidden_layers=6), "layers", "2*dense 1*moe 1*dense 1*moe 1*dense"),
        ("deepseek", dict(first_k_dense_replace=0), "layers", "3*moe"),
        ("deepseek", dict(n_routed_experts=None), "layers", "3*dense"),
        ("deepseek", dict(n_shared_experts=None), "shared_expert_size", 0),
        ("deepseek", dict(norm_topk_prob=True), "router.norm_topk_prob", True),
        ("deepseek", dict(norm_topk_prob=True, num_experts_per_tok=1), "router.norm_topk_prob", False),
        ("deepseek", dict(rope_scaling={"type": "linear", "factor": 4.0}), "attention.rope_scaling.factor", 4.0),
        ("openmoe", dict(moe_layer_interval=1), "layers", "4*(moe dense:none)"),
        ("openmoe", dict(moe_layer_interval=5), "layers", "4*dense"),
        ("openmoe", dict(num_hidden_layers=4, moe_layer_interval=3), "layers", "2*dense 1*moe 1*dense:none 1*dense"),
        ("openmoe", dict(rope_theta=1e6), "attention.rope_theta", 10_000.0),
        ("openmoe", dict(router_topk=1), "router.num_experts_per_tok", 1),
    ],
)
def test_settings_are_read_as_their_class_reads_them_and_written_again(name, changes, path, value):
    given = TINY[name] | changes
    family = find(given["architectures"][0], "config.json")
    config = family.read(given)
    found = expand(config) if path == "layers" else look_up(config, path)
    assert found == (expand(build(ModelConfig, {"layers": value}, "model")) if path == "layers" else value)
    assert not family.mismatches(config)
    assert family.read(family.write(config)).losses == config.losses


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("deepseek", dict(scoring_func="sigmoid"), "scoring_func.*sigmoid.*softmax"),
        ("deepseek", dict(rope_scaling={"type": "dynamic", "factor": 4.0}), "dynamic"),
        ("deepseek", dict(rope_scaling={"type": "yarn", "factor": 4.0}), "yarn.*linear"),
        ("openmoe", dict(hidden_act="silu"), "hidden_act.*silu.*swiglu"),
        ("openmoe", dict(mlp_gated=False), "mlp_gated"),
        ("openmoe", dict(num_hidden_layers="4"), "num_hidden_layers"),
    ],
)
def test_what_their_class_does_not_have_is_refused(name, changes, words):
    given = TINY[name] | changes
    with pytest.raises(CheckpointError, match=f"config.json: .*{words}"):
        find(given["architectures"][0], "config.json").read(given)


def test_what_is_not_quite_such_a_model_is_not_written_as_one():
    for name, change, words in (
        ("deepseek", {"attention": {"head_dim": 16}}, "attention.head_dim=16"),
        ("openmoe", {"layers": "4*(dense moe)"}, "layers=dense moe"),
        ("openmoe", {"attention": {"softmax_scale": None}}, "attention.softmax_scale=None (there 1.0)"),
        ("openmoe", {"experts": {"linear_factor": False}}, "experts.linear_factor=None (there True)"),
    ):
        family = find(TINY[name]["architectures"][0], "")
        config = build(ModelConfig, overlay(to_dict(family.read(TINY[name])), change), "model")
        (found,) = family.mismatches(config)
        assert words in found
