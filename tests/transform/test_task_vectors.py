"""Fine-tunes of one base as one model, against plain numpy."""

import numpy as np
import pytest

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build
from moe_zoo.inference import Loaded
from moe_zoo.models import Decoder, ModelConfig
from moe_zoo.transform import add_adapters
from moe_zoo.transform.task_vectors import breadcrumbs, dare, middle, task_arithmetic, ties, trimmed

CONFIG = build(
    ModelConfig,
    {"vocab_size": 16, "hidden_size": 8, "layers": "2*moe", "num_experts": 3, "moe_intermediate_size": 6,
     "attention": {"num_attention_heads": 2}},
    "model",
)  # fmt: skip
UP = "segments.0.blocks.0.ffn.experts.w_up"


def loaded(values) -> Loaded:
    return Loaded(P.materialize(Decoder(CONFIG), 0, given=values), CONFIG, None)


@pytest.fixture(scope="module")
def models():
    """(base, three fine-tunes, their arrays); one parameter no fine-tune has changed."""
    first = P.materialize(Decoder(CONFIG), 0)
    old = {n: np.asarray(a) for n, a in P.arrays(first).items()}
    rng, tuned = np.random.default_rng(0), []
    for _ in range(3):
        noise = lambda n, a: 0 if n == "norm.scale" else 0.1 * rng.standard_normal(a.shape)
        tuned.append({n: (a + noise(n, a)).astype(np.float32) for n, a in old.items()})
    return loaded(old), [loaded(t) for t in tuned], old, tuned


def values_of(model: Loaded) -> dict[str, np.ndarray]:
    return {n: np.asarray(a) for n, a in P.arrays(model.model).items()}


def test_task_arithmetic_averages_and_forgets(models):
    base, tuned, old, arrays = models
    soup, back = values_of(task_arithmetic(base, tuned, 1 / 3)), values_of(task_arithmetic(base, tuned[:1], -1.0))
    for name in old:
        np.testing.assert_allclose(soup[name], np.mean([a[name] for a in arrays], 0), atol=1e-6)
        np.testing.assert_allclose(back[name], 2 * old[name] - arrays[0][name], atol=1e-6)
    np.testing.assert_array_equal(soup["norm.scale"], old["norm.scale"])


def test_breadcrumbs_keeps_the_middle_of_every_tensor(models):
    base, tuned, old, arrays = models
    new = values_of(breadcrumbs(base, tuned, 0.5, keep=0.25, drop_top=0.1))
    for layer in range(2):
        for e in range(3):
            expected = old[UP][layer, e].astype(np.float64)
            for one in arrays:
                tau = (one[UP] - old[UP])[layer, e]
                order = np.argsort(-np.abs(tau), axis=None, kind="stable")
                kept = np.zeros(tau.size)
                kept[order[4 : 4 + 12]] = 1  # of 48
                expected = expected + 0.5 * tau * kept.reshape(tau.shape)
            np.testing.assert_allclose(new[UP][layer, e], expected, atol=1e-6)
    same, plain = breadcrumbs(base, tuned, 0.3, keep=1.0, drop_top=0.0), task_arithmetic(base, tuned, 0.3)
    for name, value in values_of(plain).items():
        np.testing.assert_allclose(values_of(same)[name], value, atol=1e-6)
    np.testing.assert_array_equal(middle(np.array([3.0, -5, 1, 2]), 0.5, 0.25), [3, 0, 0, 2])


def test_ties_trims_elects_and_averages_those_that_agree():
    tau = {"x": np.array([1.0, -4, 0.5, 3]), "y": np.array([0.1, 2.0])}
    kept = trimmed(tau, 0.5)
    np.testing.assert_array_equal(kept["x"], [0, -4, 0, 3])
    np.testing.assert_array_equal(kept["y"], [0, 2])


def test_ties_number_by_number(models):
    base, tuned, old, arrays = models
    new = values_of(ties(base, tuned, 0.9, keep=0.6))
    taus = [trimmed({n: a[n] - old[n] for n in old}, 0.6) for a in arrays]
    for index in np.ndindex(2, 2, 3):
        at = (index[0], index[1], 0, index[2])
        found = [float(tau[UP][at]) for tau in taus]
        agree = [t for t in found if t * sum(found) > 0]
        expected = old[UP][at] + 0.9 * (np.mean(agree) if agree else 0)
        np.testing.assert_allclose(new[UP][at], expected, atol=1e-6)
    alone = values_of(ties(base, tuned[:1], 1.0, keep=1.0))
    np.testing.assert_allclose(alone[UP], arrays[0][UP], atol=1e-6)


def test_dare_drops_at_random_and_makes_up_for_it(models):
    base, tuned, old, arrays = models
    new = values_of(dare(base, tuned[:1], density=0.25, seed=3))
    tau, made = arrays[0][UP] - old[UP], new[UP] - old[UP]
    kept = np.abs(made) > 1e-7
    assert 0.15 < kept.mean() < 0.35
    np.testing.assert_allclose(made[kept], 4 * tau[kept], atol=1e-5)
    np.testing.assert_array_equal(values_of(dare(base, tuned[:1], density=0.25, seed=3))[UP], new[UP])


def test_mistakes_are_named(models):
    base, tuned, old, _ = models
    with pytest.raises(ConfigError, match="keep: expected a share in .0, 1., got 2"):
        ties(base, tuned, keep=2)
    with pytest.raises(ConfigError, match="at least one fine-tune"):
        task_arithmetic(base, [])
    with pytest.raises(ConfigError, match="transform.merge puts them into its weights"):
        task_arithmetic(base, [add_adapters(base, "lora")])
