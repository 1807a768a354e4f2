"""MoGU: what a gate weighs, its routers' three maps, the labels' loss, who trains in which stage, who writes what."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_adapter_contract import BASE, base
from test_adapter_entries import CTX, changed, make, run

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.inference import Loaded, generate
from moe_zoo.transform import add_adapters, join_experts

MOGU = {"name": "mogu", "target_modules": ["mixer.*"], "unsafe_domains": [1]}
UNWILL, GLAD = 0, 1


def responder(adapter, x, e):
    """What one of the two adds, by itself."""
    return np.asarray(adapter.out(adapter.hidden(x)[:, e : e + 1], None)) if adapter.num_experts == 1 else np.asarray(
        (x @ adapter.a[...][e].T * adapter.scale[...][e]) @ adapter.b[...][e]
    )  # fmt: skip


def test_a_gate_weighs_the_base_and_its_responder():
    adapter, x, y, w = make(**MOGU)
    still = lambda *bias: changed(adapter, router=np.zeros((8, 2)), bias=bias)
    np.testing.assert_allclose(run(still(50, -50), x, y, w)[0], y + responder(adapter, x, UNWILL), atol=1e-5)
    np.testing.assert_allclose(run(still(-50, 50), x, y, w)[0], y + responder(adapter, x, GLAD), atol=1e-5)
    both = run(still(50, 50), x, y, w)[0]
    np.testing.assert_allclose(both, 2 * y + responder(adapter, x, UNWILL) + responder(adapter, x, GLAD), atol=1e-5)
    # without responders it is not the base, unless the gates sum to 1
    empty = changed(adapter, b=np.zeros_like(adapter.b[...]))
    gates = 1 / (1 + np.exp(-(np.asarray(x) @ np.asarray(adapter.router[...]) + np.asarray(adapter.bias[...]))))
    np.testing.assert_allclose(run(empty, x, y, w)[0], gates.sum(1, keepdims=True) * y, rtol=1e-5, atol=1e-6)
    pair = make(**MOGU, gate="softmax")[0]
    np.testing.assert_allclose(run(changed(pair, b=np.zeros_like(pair.b[...])), x, y, w)[0], y, rtol=1e-6, atol=1e-6)


def test_three_maps_without_anything_between_them_are_one():
    adapter, x, y, w = make(**MOGU, d_router=5)
    p = {name: np.asarray(value, np.float64) for name, value in P.arrays(adapter).items()}
    through = [(x @ p["down"][e] @ p["up"][e] + p["up_bias"][e]) @ p["router"][:, e] + p["bias"][e] for e in range(2)]
    w_DE, c_E = adapter.affine()
    np.testing.assert_allclose(x @ w_DE + c_E, np.stack(through, 1), rtol=1e-4, atol=1e-4)
    collapsed = changed(make(**MOGU)[0], a=adapter.a[...], b=adapter.b[...], router=w_DE, bias=c_E)
    np.testing.assert_allclose(run(adapter, x, y, w)[0], run(collapsed, x, y, w)[0], rtol=1e-5, atol=1e-5)


def test_routers_learn_labels_of_the_sequences_domain():
    adapter, x, y, w = make(**MOGU, router_coef=3.0)
    half = changed(adapter, router=np.zeros((8, 2)), bias=np.log([0.25 / 0.75, 0.5 / 0.5]))  # alpha 1/4, beta 1/2
    valid = np.array([True, True, False, True, True, True])
    _, aux = run(half, x, y, w, CTX.replace(valid=valid))
    plain, unsafe = 0.25**2 + 0.5**2, 0.75**2 + 0.5**2  # (alpha - 0)^2 + (beta - 1)^2; (alpha - 1)^2 + beta^2
    # two valid tokens of domain 0, two of 1; the last is of none
    np.testing.assert_allclose(aux.losses["adapter_label"], 3 * (2 * plain + 2 * unsafe) / 4, rtol=1e-5)
    linear = dataclasses.replace(half.linear, num_layers=4)
    quarter = type(half)(half.config, linear).losses(None, jnp.asarray([[0.25, 0.5]] * 6), CTX.replace(valid=valid))
    np.testing.assert_allclose(quarter["label"], aux.losses["adapter_label"] / 4, rtol=1e-5)
    assert not run(half, x, y, w, CTX.replace(domain=None))[1].losses


@pytest.mark.parametrize("stage, own", [("unwill", UNWILL), ("glad", GLAD)])
def test_in_a_responders_stage_it_acts_and_moves_alone(stage, own):
    adapter, x, y, w = make(**MOGU, stage=stage, freeze_experts=False)
    np.testing.assert_allclose(run(adapter, x, y, w)[0], y + responder(adapter, x, own), atol=1e-5)
    held = {name: np.asarray(mask).ravel().tolist() for name, mask in adapter.held().items()}
    assert held == {name: [own != 0, own != 1] for name in ("a", "b")}
    kinds = {name: isinstance(var, P.Frozen) for name, var in P.flat(adapter).items()}
    assert kinds == {"a": False, "b": False, "router": True, "bias": True, "scale": True}
    assert adapter.idle_parameters() == 2 * (8 + 6) and adapter.config.adapted_tokens is None
    routers = make(**MOGU)[0]  # the last stage: what was trained before is no longer
    kinds = {name: isinstance(var, P.Frozen) for name, var in P.flat(routers).items()}
    assert kinds == {"a": True, "b": True, "router": False, "bias": False, "scale": True} and not routers.held()


@pytest.mark.parametrize("settings, message", [
    ({"num_experts": 3}, "num_experts: 3; there are two responders"),
    ({"stage": "glad"}, "freeze_experts: true; in stage 'glad' a responder is trained"),
    ({"unsafe_domains": []}, "unsafe_domains: empty; router_coef=2.0 needs the ids"),
])  # fmt: skip
def test_mistakes_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**(MOGU | settings))


@pytest.fixture(scope="module")
def joined():
    """A base and two runs with one LoRA each, as the responders."""
    plain, learned = Loaded(base(), BASE, None), []
    for seed in range(2):
        made = add_adapters(plain, {"name": "lora", "target_modules": ["mixer.o"], "r": 2})
        values = P.arrays(made.model)
        for name in [n for n in values if n.endswith((".a", ".b"))]:
            values[name] = jnp.float32(np.random.default_rng(seed).standard_normal(values[name].shape))
        made.model = P.replace(made.model, values)
        learned.append(made)
    mogu = join_experts(plain, learned, {"name": "mogu", "unsafe_domains": [1], "decoded_tokens": 2})
    return plain, learned, mogu


def test_trained_responders_are_joined_and_routers_begin_at_a_half(joined):
    _, learned, mogu = joined
    prefix = "segments.0.blocks.0.adapters.mixer.o."
    for e, one in enumerate(learned):
        np.testing.assert_array_equal(P.arrays(mogu.model)[prefix + "b"][:, e], P.arrays(one.model)[prefix + "b"][:, 0])
    assert not np.asarray(P.arrays(mogu.model)[prefix + "router"]).any()
    assert mogu.model.adapted_tokens == 2 and learned[0].model.adapted_tokens is None


def test_adapters_write_the_first_tokens_and_the_base_the_rest(joined):
    """Against both models run whole for every token: what the base reads of the first tokens are its own keys."""
    plain, _, mogu = joined
    prompts = [np.array([3, 7, 1, 20]), np.array([5])]
    forward = jax.jit(lambda model, ids: model(ids)[0])

    def text(prompt, new, adapted):
        row = np.zeros((1, 16), np.int32)
        row[0, : len(prompt)] = prompt
        for at in range(len(prompt), len(prompt) + new):
            writes = mogu.model if at - len(prompt) < adapted else plain.model
            row[0, at] = np.asarray(forward(writes, row))[0, at - 1].argmax()
        return row[0, len(prompt) : len(prompt) + new]

    greedy = lambda model, new: generate(model, prompts, new, temperature=0.0)
    for prompt, whole, first in zip(prompts, greedy(mogu.model, 8), greedy(mogu.model, 2)):
        np.testing.assert_array_equal(whole, text(prompt, 8, adapted=2))
        np.testing.assert_array_equal(first, text(prompt, 2, adapted=2))
    none = add_adapters(plain, {"name": "mogu", "unsafe_domains": [1], "decoded_tokens": 0})
    for seed, settings in enumerate(({"temperature": 0.0}, {"temperature": 2.0, "top_k": 5})):
        ours, theirs = (generate(m, prompts, 8, seed=seed, **settings) for m in (none.model, plain.model))
        for a, b in zip(ours, theirs):
            np.testing.assert_array_equal(a, b)
    assert any((text(p, 8, adapted=2) != text(p, 8, adapted=8)).any() for p in prompts)
