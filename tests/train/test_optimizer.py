"""Learning rates, what decays, and that accumulation changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.models import Decoder
from moe_zoo.sharding import make_mesh
from moe_zoo.train.config import OPTAX_OPTIMIZERS, OptimConfig, load_config
from moe_zoo.train.optimizer import is_matrix, learning_rate, make_optimizer
from moe_zoo.train.step import Trainer, partition

TINY = "configs/quickstart.py:tiny"


def trainer(*overrides):
    config = load_config(TINY, [("model.dtype", "float32"), *overrides])
    return Trainer(config, make_mesh(devices=jax.devices()[:1]), config.train.objective.make())


def batch(B=8, S=16, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 256, (B, S + 1)).astype(np.int32)
    mask = rng.random((B, S)) < 0.7  # uneven: a mean of micro-batch means would differ
    mask[: B // 2, S // 2 :] = False
    segments = np.where(np.arange(S) < S // 2, 1, 2) * np.ones((B, 1))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segments.astype(np.int32),
        "positions": np.tile(np.arange(S) % (S // 2), (B, 1)).astype(np.int32),
        "domain": np.zeros((B, S), np.int32),
        "loss_mask": mask,
    }


@pytest.mark.parametrize(
    "schedule, at_half, at_end",
    [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("wsd", 1.0, 0.1), ("constant", 1.0, 1.0)],
)
def test_schedules_start_at_the_peak_and_end_at_the_final_fraction(schedule, at_half, at_end):
    config = OptimConfig(learning_rate=2.0, schedule=schedule, warmup_steps=10, final_fraction=0.1, decay_fraction=0.2)
    rate = lambda step, progress: float(learning_rate(config, jnp.int32(step), jnp.float32(progress)))
    assert rate(0, 0.0) == pytest.approx(0.2)  # a tenth of the peak at the first of ten warm-up steps
    assert rate(4, 0.0) == pytest.approx(1.0)
    assert rate(100, 0.0) == pytest.approx(2.0)
    assert rate(100, 0.5) == pytest.approx(2 * at_half)
    assert rate(100, 1.0) == pytest.approx(2 * at_end)
    if schedule == "wsd":
        assert rate(100, 0.9) == pytest.approx(2 * 0.55)


def test_weight_decay_touches_matrices_only():
    model = Decoder(load_config(TINY).model)
    decayed = {n for n, v in P.flat(model).items() if is_matrix(n, v.logical_axes)}
    assert "segments.0.blocks.0.ffn.experts.w_up" in decayed
    assert "segments.0.blocks.0.mixer.q" in decayed and "head.kernel" in decayed
    assert not any("norm" in name or name.startswith("embed.") for name in decayed)


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    # router losses are means over a micro-batch: their share is a different function of the cut, so they are off here
    off = [("model.losses", "{}")]
    whole, parts = trainer(*off), trainer(*off, ("train.accumulation", "4"))
    state = whole.init_state()
    data = {k: jnp.asarray(v) for k, v in batch().items()}
    weights = data.pop("loss_mask").astype(jnp.float32)
    data["loss_weights"] = weights / weights.sum()
    key = jax.random.key(0)
    (a, sa), (b, sb) = (jax.jit(t._gradients)(state, data, jnp.int32(0), key) for t in (whole, parts))
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=2e-6, err_msg=name)
    np.testing.assert_allclose(sa["scalars"]["loss"].value(), sb["scalars"]["loss"].value(), rtol=1e-5)
    load = lambda s: s["layers"]["segments.0.blocks.0"]["load"].value()
    np.testing.assert_array_equal(load(sa), load(sb))


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "sgd"])
def test_every_optimizer_lowers_the_loss(name):
    rate = {"adamw": 3e-3, "muon": 3e-3, "lion": 1e-3, "sgd": 0.3}[name]
    t = trainer(("optim.name", name), ("optim.learning_rate", str(rate)), ("optim.warmup_steps", "0"))
    state, losses = t.init_state(), []
    for _ in range(8):
        state, stats = t.train_step(state, batch(), jnp.float32(0.0))
        losses.append(float(stats["scalars"]["loss"]))
    assert losses[-1] < losses[0] - 0.1, losses


@pytest.fixture(scope="module")
def steps():
    """(the trainer of frozen parameters beside a balancing bias, [(state, statistics)] before and after four steps)."""
    t = trainer(
        ("train.freeze", "['*.router.*', 'embed.*']"),
        ("model.router.score_function", "sigmoid"),
        ("model.router.correction_bias", "true"),
        ("model.router.bias_update_rate", "0.01"),
    )
    state = t.init_state()
    seen = [(jax.device_get(state), None)]
    for i in range(4):
        state, stats = t.train_step(state, batch(seed=i), jnp.float32(i / 4))
        seen.append(jax.device_get((state, stats)))
    return t, seen


def test_frozen_parameters_stay_bit_for_bit_and_have_no_moments(steps):
    (before, _), *_, (after, _) = steps[1]
    assert set(before["frozen"]) == {"segments.0.blocks.0.ffn.router.kernel", "embed.table"}
    moments = {str(path) for path, _ in jax.tree_util.tree_leaves_with_path(before["opt"])}
    assert not any("router" in m for m in moments) and any("experts" in m for m in moments)
    for name, value in before["frozen"].items():
        np.testing.assert_array_equal(value, after["frozen"][name])
    assert (before["trainable"]["head.kernel"] != after["trainable"]["head.kernel"]).any()


def test_freeze_pattern_that_matches_nothing_is_an_error():
    for pattern in ("nothing_here*", "!nothing_here*"):
        with pytest.raises(ValueError, match=f"'{pattern[:-1]}"):
            partition(Decoder(load_config(TINY).model), (pattern,))


def test_of_freeze_patterns_the_last_that_matches_decides():
    model = Decoder(load_config(TINY).model)
    only = partition(model, ("*", "!*.router.*"))
    assert only.trainable == ("segments.0.blocks.0.ffn.router.kernel",) and "embed.table" in only.frozen
    with pytest.raises(ValueError, match="not frozen anyway"):
        partition(Decoder(load_config(TINY, [("model.adapters.name", "lora")]).model), ("!embed.table",))
    assert partition(model, ("!*.router.*", "*.ffn.*")).trainable == partition(model, ("*.ffn.*",)).trainable


def test_balancing_bias_moves_against_the_load_and_meets_no_gradient(steps):
    (before, _), (state, stats), *_ = steps[1]
    name = "segments.0.blocks.0.ffn.router.correction"
    assert list(before["buffers"]) == [name]
    load = np.asarray(stats["layers"]["segments.0.blocks.0"]["load"].total, float)
    expected = 0.01 * np.sign(load.mean(-1, keepdims=True) - load)
    np.testing.assert_allclose(state["buffers"][name], expected, atol=1e-7)


def test_one_compilation_serves_all_steps(steps):
    assert steps[0].train_step._cache_size() == 1


@pytest.mark.parametrize("name", OPTAX_OPTIMIZERS)
def test_an_optimizer_of_optax_takes_steps_that_are_a_multiple_of_the_rate(name):
    """The step multiplies the learning rate in, so optax at rate r must equal optax at rate 1 times r."""
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((6, 5)).astype(np.float32), "b": np.ones(5, np.float32)}
    grads = [jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), params) for _ in range(3)]
    make = functools.reduce(getattr, name.split("."), optax)
    theirs, one = make(learning_rate=0.01), make(learning_rate=1.0)
    ours = make_optimizer(OptimConfig(name=name), {"w": ("embed", "mlp"), "b": ("mlp",)})

    @jax.jit
    def step(g, p, q, total, states):
        u, s = one.update(g, states[0], p)
        v, r = theirs.update(g, states[1], q)
        updates, state = ours.update(g, states[2], params)
        p, q = jax.tree.map(lambda a, b: a + 0.01 * b, p, u), optax.apply_updates(q, v)
        return p, q, jax.tree.map(lambda t, u: t + jnp.abs(u), total, updates), (s, r, state)

    p, q, total = params, params, jax.tree.map(np.zeros_like, params)
    states = jax.jit(lambda params: tuple(tx.init(params) for tx in (one, theirs, ours)))(params)
    for g in grads:
        p, q, total, states = step(g, p, q, total, states)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), p, q)
    assert all(float(t.max()) > 0 for t in jax.tree.leaves(total))  # some give nothing at first


def test_options_of_optax_are_passed_on_and_decay_is_decoupled_where_it_has_none():
    axes = {"w": ("embed", "mlp"), "b": ("mlp",)}
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    tx = make_optimizer(OptimConfig(name="signum", options=("beta=0.5",), weight_decay=0.1, clip_norm=None), axes)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -1.1, rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -1.0, rtol=1e-6)
    with pytest.raises(ConfigError, match="optim.options: signum of optax: .*'gamma'.*it takes learning_rate, beta"):
        make_optimizer(OptimConfig(name="signum", options=("gamma=0.5",)), axes)
    with pytest.raises(ConfigError, match="optim.name: unknown 'signim'.*did you mean 'signum'"):
        load_config(TINY, [("optim.name", "signim")])
    with pytest.raises(ConfigError, match="optim.options: only for those of optax"):
        load_config(TINY, [("optim.options", "['b1=0.5']")])


def test_a_schedule_of_optax_runs_over_steps_from_the_learning_rate():
    config = OptimConfig(
        learning_rate=0.5, warmup_steps=0, schedule="exponential_decay",
        schedule_options=("transition_steps=10", "decay_rate=0.1"),
    )  # fmt: skip
    rate = lambda step: float(learning_rate(config, jnp.int32(step), jnp.float32(0.9)))
    assert rate(0) == pytest.approx(0.5) and rate(10) == pytest.approx(0.05) and rate(20) == pytest.approx(0.005)
    wrong = dataclasses.replace(config, schedule_options=("decay_rate=0.1",))
    with pytest.raises(ConfigError, match="optim.schedule_options: exponential_decay of optax.*transition_steps"):
        learning_rate(wrong, jnp.int32(0), jnp.float32(0))
