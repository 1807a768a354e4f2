"""LoRA beside the experts of a routed layer: what it computes is the experts with the updates in their weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build
from moe_zoo.inference import Loaded
from moe_zoo.models import Decoder, ModelConfig
from moe_zoo.models.counting import count_adapters, count_parameters, train_flops_per_token
from moe_zoo.transform import add_adapters, merge, unmerge

IDS = np.random.default_rng(0).integers(0, 24, (2, 7)).astype(np.int32)
TARGETS = {
    "name": "lora", "target_modules": ["experts.*", "q"], "r": 3,
    "rank_pattern": {"layers.1.ffn.experts.w_up": 2},
}  # fmt: skip


def routed(dispatch: str = "dropless") -> Loaded:
    settings = {
        "vocab_size": 24, "hidden_size": 8, "layers": "2*moe", "num_experts": 3, "moe_intermediate_size": 6,
        "attention": {"num_attention_heads": 2}, "dispatch": {"name": dispatch},
    }  # fmt: skip
    config = build(ModelConfig, settings, "model")
    return Loaded(P.materialize(Decoder(config), 0), config, None)


def adapted(loaded: Loaded) -> Loaded:
    made = add_adapters(loaded, TARGETS)
    rng = np.random.default_rng(1)
    fill = lambda n, a: jnp.float32(rng.standard_normal(a.shape)) if ".adapters." in n and "scale" not in n else a
    made.model = P.replace(made.model, {n: fill(n, a) for n, a in P.arrays(made.model).items()})
    return made


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_it_is_the_experts_with_the_updates_in_their_weights(dispatch):
    base = routed(dispatch)
    fresh, made = add_adapters(base, TARGETS), adapted(base)
    logits = jax.jit(lambda model: model(IDS)[0])
    np.testing.assert_allclose(logits(fresh.model), logits(base.model), atol=1e-6)
    merged = merge(made)
    np.testing.assert_allclose(logits(merged.model), logits(made.model), atol=2e-4)
    assert np.abs(logits(made.model) - logits(base.model)).max() > 0.1
    path = "segments.0.blocks.0.ffn.experts"
    old, new, values = P.arrays(base.model), P.arrays(merged.model), P.arrays(made.model)
    for e in range(3):
        a, b = (np.asarray(values[f"{path}.adapters.w_up.{n}"], np.float64)[1, e, :2] for n in "ab")
        expected = np.asarray(old[f"{path}.w_up"])[1, e] + 16 / 2 * a.T @ b
        np.testing.assert_allclose(new[f"{path}.w_up"][1, e], expected, atol=1e-4)
    for name, value in P.arrays(unmerge(merged, made).model).items():
        np.testing.assert_allclose(value, values[name], atol=2e-5)


def test_gradients_reach_live_ranks_of_every_expert_and_are_counted():
    made = adapted(routed())
    variables = P.flat(made.model)
    trained = {n: v.get_value() for n, v in variables.items() if not isinstance(v, P.Frozen)}
    rest = {n: v.get_value() for n, v in variables.items() if n not in trained}
    loss = lambda t: (P.replace(made.model, t | rest)(IDS)[0] ** 2).mean()
    gradients = jax.jit(jax.grad(loss))(trained)
    assert len(gradients) == 2 * 4
    for path, gradient in gradients.items():
        moved = np.abs(gradient).max(-1) > 0
        assert moved[0].all(), path
        assert moved[1].any() and (not path.endswith(("w_up.a", "w_up.b")) or not moved[1, :, 2].any()), path
    counts = count_adapters(made.model)
    D, F = 8, 6
    up, rows = 3 * (D + F), 3
    assert counts["linear"] == 2 * 7 and counts["matched"] == 2 * 4
    assert count_parameters(made.model)["trainable"] == up * (3 + 2) + 2 * 2 * up * rows + 2 * rows * 2 * D
    assert train_flops_per_token(made.model, 8) > 2 / 3 * train_flops_per_token(routed().model, 8)


@pytest.mark.parametrize("settings, message", [
    ({"name": "mola"}, "'ffn.experts.w_.*' is of experts that are routed already; beside those 'lora' has one update"),
    ({"name": "lora", "use_dora": True}, "beside those there is neither DoRA nor dropout"),
])  # fmt: skip
def test_what_cannot_be_beside_experts_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        add_adapters(routed(), {"target_modules": ["ffn.*"], **settings})
