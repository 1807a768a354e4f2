"""Null experts in a trained model, and a dense model upcycled: at first they compute what the given model did."""

import jax
import numpy as np
import pytest
from naive import normal, tiny_model

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.inference import Loaded
from moe_zoo.sharding import make_mesh, sharding_of
from moe_zoo.transform import add_null_experts, upcycle

IDS = np.random.default_rng(0).integers(0, 32, (2, 9))


def loaded(**changes) -> Loaded:
    """As `load` makes it: arrays that know their mesh."""
    model, mesh = tiny_model(**changes), make_mesh(devices=jax.devices()[:1])
    put = lambda var, path, x: jax.device_put(x, sharding_of(mesh, var.logical_axes, x.shape, path))
    return Loaded(P.materialize(model, 0, put, P.arrays(model)), model.config, None)


@pytest.fixture(scope="module")
def top2():
    return loaded(layers="1*dense 2*moe")


@pytest.mark.parametrize("copies, picks", [(1, 3), (2, 4)], ids=["paper (8, 3)", "paper (16, 4)"])
def test_copied_nulls_leave_the_output_as_it_was(top2, copies, picks):
    before = top2(IDS, return_routing=True)
    new = add_null_experts(top2, copies)
    after = new(IDS, return_routing=True)
    np.testing.assert_allclose(after.logits, before.logits, atol=1e-5)
    assert new.config.router.config.picks_per_token == picks and new.config.router.config.num_null_experts == 4 * copies
    assert {c.name for c in new.config.losses} == {"null_load_balance", "z_loss"}
    for old, now in zip(before.aux.stats["router_experts"], after.aux.stats["router_experts"], strict=True):
        now = np.asarray(now)
        np.testing.assert_array_equal(now[now < 4].reshape(-1, 2), old)  # two true experts, in their order
    kernels = {n: np.asarray(a) for n, a in P.arrays(new.model).items() if ".router." in n}
    for path in [n for n in kernels if n.endswith("null_kernel")]:
        np.testing.assert_array_equal(kernels[path], np.tile(kernels[path.replace("null_kernel", "kernel")], copies))
    assert top2.config.router.name == "top_k" and "null_kernel" not in " ".join(P.arrays(top2.model))


def test_more_picks_give_more_experts(top2):
    experts = add_null_experts(top2, picks_per_token=5)(IDS, return_routing=True).aux.stats["router_experts"]
    assert all(((np.asarray(e) < 4).sum(-1) == 3).all() for e in experts)


@pytest.mark.parametrize("settings, message", [
    ({"router": {"name": "switch"}}, "added to a 'top_k' router, this model's is 'switch'"),
    ({"router": {"name": "top_k", "norm_topk_prob": False}}, "norm_topk_prob=false is not"),
    ({"router": {"name": "top_k", "score_function": "sigmoid", "routed_scaling_factor": 2.0}},
     "score_function=sigmoid .*routed_scaling_factor=2.0 is not"),
    ({"layers": "2*dense"}, "this model has none"),
    ({"layers": "1*(moe moe:own)", "variants": {"own": {"router": {"num_experts_per_tok": 1}}}}, "variant 'own'"),
])  # fmt: skip
def test_models_whose_gates_would_change_are_refused(settings, message):
    model = tiny_model(**settings)
    with pytest.raises(ConfigError, match=message):
        add_null_experts(Loaded(model, model.config, None))


def test_a_negative_or_impossible_number_is_refused(top2):
    with pytest.raises(ConfigError, match="copies: expected at least 1.*got 0"):
        add_null_experts(top2, 0)
    with pytest.raises(ConfigError, match="9 picks of num_experts=4 and num_null_experts=4; at most 8"):
        add_null_experts(top2, picks_per_token=9)


@pytest.fixture(scope="module")
def dense():
    made = loaded(layers="3*dense", mlp={"activation": "gelu", "bias": True})
    biased = {n: normal(1, *a.shape, scale=0.1) if ".ffn.b_" in n else a for n, a in P.arrays(made.model).items()}
    made.model = P.replace(made.model, biased)
    return made


@pytest.mark.parametrize("layers, routed", [(None, (0, 1, 2)), ("1*(dense moe) 1*dense", (1,))], ids=["all", "second"])
def test_an_upcycled_model_begins_as_the_dense_one(dense, layers, routed):
    new = upcycle(dense, 5, layers=layers, router={"name": "top_k", "num_experts_per_tok": 2, "init_std": 1.0})
    output = new(IDS, return_routing=True)
    np.testing.assert_allclose(output.logits, dense(IDS).logits, atol=1e-5)
    assert len(output.aux.stats["router_experts"]) == len(routed)
    given, made = (P.arrays(m.model) for m in (dense, new))
    stacks = {n: np.asarray(a) for n, a in made.items() if n.endswith("experts.w_up")}
    copies, parent = np.concatenate([*stacks.values()]), np.asarray(given["segments.0.blocks.0.ffn.w_up"])
    assert copies.shape == (len(routed), 5, 16, 24)
    np.testing.assert_array_equal(copies, parent[list(routed)][:, None].repeat(5, 1))
    assert all(np.std(np.asarray(a)) > 0.5 for n, a in made.items() if n.endswith("router.kernel"))


def test_raw_gates_scale_what_the_dense_model_adds(dense):
    """What upcycling promises holds where gates sum to 1, and only there."""
    new = upcycle(dense, 5, router={"name": "top_k", "norm_topk_prob": False})
    assert np.abs(new(IDS).logits - dense(IDS).logits).max() > 1e-3


def test_what_cannot_be_upcycled_is_refused(top2, dense):
    with pytest.raises(ConfigError, match="expected a dense model, this one has 2 routed layers of 3"):
        upcycle(top2)
    with pytest.raises(ConfigError, match=r"'2\*moe' has 2 layers, the model has 3"):
        upcycle(dense, layers="2*moe")
    with pytest.raises(
        ConfigError, match=r"experts\.\w+: the dense model's has shape \[3, 8, .*24.*the settings ask for"
    ):
        upcycle(dense, layers="3*moe", moe_intermediate_size=8)
    with pytest.raises(ConfigError, match="unknown router 'topk'.*'top_k'"):
        upcycle(dense, router="topk")
