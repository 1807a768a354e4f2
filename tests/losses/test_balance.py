"""Load balance within micro-batches, within sequences, and over the whole step: on devices, under accumulation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from naive import normal

from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build
from moe_zoo.losses.load_balance import LoadBalance, LoadBalanceConfig, load_balance, mean_load_balance
from moe_zoo.models import ModelConfig
from moe_zoo.models.decoder import per_layer_terms
from moe_zoo.sharding import MeshConfig, make_mesh
from moe_zoo.train.config import load_config
from moe_zoo.train.objective import forward
from moe_zoo.train.step import Trainer

B, S, E, K, D = 8, 6, 5, 2, 7
T = B * S
VALID = np.random.default_rng(5).random(T) < 0.6
VALID[2 * S : 3 * S] = False  # a row of padding
MODES = {
    "global": ({"over": "global"}, B),
    "micro": ({"over": "micro"}, B),
    "buffer": ({"over": "buffer"}, B),
    "micro of 4": ({"over": "micro", "sequences": 4}, 4),
    "micro of 3": ({"over": "micro", "sequences": 3}, 3),
    "sequence": ({"over": "sequence"}, 1),
}


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(config, kernel, x, valid):
    def loss(kernel):
        logits = x @ kernel
        choice = TokenChoice(jax.lax.top_k(logits, K)[1], jnp.ones((T, K)), E).masked(valid)
        routing = Routing(choice, logits, jax.nn.softmax(logits))
        return LoadBalance(config)(routing, RoutingContext(batch=B, seq=S, train=True, valid=valid))

    return jax.value_and_grad(loss)(kernel)


def by_loop(probs, experts, valid, rows):
    """The mean over groups of `rows` rows, weighted by their valid tokens."""
    total = 0.0
    for first in range(0, B, rows):
        group = slice(first * S, (first + rows) * S)
        if valid[group].any():
            total += valid[group].sum() * naive.load_balance(probs[group], experts[group], valid[group])
    return total / valid.sum()


def router():
    return normal(1, D, E), normal(2, T, D)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("valid", [np.ones(T, bool), VALID], ids=["whole", "padded"])
def test_loss_is_that_of_a_loop_over_groups_on_one_device_and_on_eight(mode, valid):
    settings, rows = MODES[mode]
    config, (kernel, x) = LoadBalanceConfig(**settings), router()
    logits = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    experts, _ = naive.top_k(logits, K)
    value, gradient = loss_and_gradient(config, kernel, x, jnp.asarray(valid))
    expected = by_loop(np.stack([naive.softmax(z) for z in logits]), experts, valid, rows)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    place = lambda a: jax.device_put(a, NamedSharding(make_mesh(MeshConfig(data=8)), PartitionSpec("data")))
    many, many_gradient = loss_and_gradient(config, kernel, place(x), place(jnp.asarray(valid)))
    assert float(many) == pytest.approx(float(value), rel=1e-6)
    np.testing.assert_allclose(many_gradient, gradient, atol=1e-6)
    assert np.abs(gradient).max() > 1e-3


def cut(G, seed=0):
    """(probabilities [G, T/G, E], counts [G, E]) of G equal groups, each with a taste of its own."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((G, T // G, E)) + 2 * rng.standard_normal((G, 1, E))
    experts = np.argsort(-logits, axis=-1)[..., :K]
    counts = np.stack([np.bincount(group.ravel(), minlength=E) for group in experts])
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), counts


def test_micro_is_global_and_the_covariance_of_load_and_probability_over_groups():
    for G in (2, 4, 8):
        probs, counts = cut(G, seed=G)
        micro = float(mean_load_balance(jnp.asarray(probs), jnp.asarray(counts)))
        whole = float(load_balance(jnp.asarray(probs).reshape(T, E), jnp.asarray(counts.sum(0))))
        f, P = counts / counts.sum(1, keepdims=True), probs.mean(1)
        covariance = sum(np.cov(f[:, e], P[:, e], bias=True)[0, 1] for e in range(E))
        assert micro - whole == pytest.approx(E * covariance, rel=1e-4) and covariance > 0.01


def test_alike_groups_agree_and_groups_with_experts_of_their_own_are_balanced_only_together():
    probs, counts = cut(1)
    alike = mean_load_balance(jnp.tile(probs, (3, 1, 1)), jnp.tile(counts, (3, 1)))
    assert float(alike) == pytest.approx(float(load_balance(jnp.asarray(probs[0]), jnp.asarray(counts[0]))), rel=1e-5)
    own = jnp.tile(jnp.eye(4)[:, None], (1, 6, 1))  # group g sends everything to expert g
    assert float(mean_load_balance(own, 6 * jnp.eye(4))) == pytest.approx(4)
    assert float(load_balance(own.reshape(-1, 4), jnp.full(4, 6))) == pytest.approx(1)


def test_first_choices_alone_may_count():
    probs, experts = jax.nn.softmax(normal(3, T, E)), jnp.tile(jnp.asarray([[1, 3]], jnp.int32), (T, 1))
    routing = Routing(TokenChoice(experts, jnp.ones((T, K)), E), None, probs)
    got = LoadBalance(LoadBalanceConfig(choices="first"))(routing, RoutingContext(batch=B, seq=S))
    assert float(got) == pytest.approx(float(E * probs[:, 1].mean()), rel=1e-5)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"over": "global", "sequences": 4}, "losses.x.sequences.*over='micro'"),
        ({"over": "micro", "sequences": 0}, "losses.x.sequences.*> 0"),
        ({"over": "buffer", "choices": "first"}, "losses.x.over.*'sequence'"),
        ({"over": "globl"}, "losses.x.over.*'global'"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        build(LoadBalanceConfig, settings, "losses.x")


# -- a whole step -----------------------------------------------------------------------------------------------------

ROWS, LENGTH = 16, 8
TWO = "1*moe 1*moe:wide"  # routed layers with different numbers of experts


@functools.cache
def batch():
    """Rows that differ, padded unevenly over micro-batches."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (ROWS, LENGTH + 1)).astype(np.int32) + 64 * (np.arange(ROWS)[:, None] % 4)
    segments = (np.arange(LENGTH) < np.where(np.arange(ROWS) % 2, 3, LENGTH)[:, None]).astype(np.int32)
    return {
        "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments,
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)), "domain": np.zeros_like(segments),
        "loss_weights": segments / np.float32(segments.sum()),
    }  # fmt: skip


def trainer(over: str, accumulation: int, mesh: MeshConfig | None = None, layers: str = "1*moe") -> Trainer:
    config = load_config("quickstart:tiny", [("train.accumulation", str(accumulation))])
    settings = {
        "hidden_size": 16, "layers": layers, "num_experts": 4, "moe_intermediate_size": 8,
        "attention": {"num_attention_heads": 2}, "router": {"name": "top_k", "init_std": 0.5},
        "losses": {"load_balance": {"coef": 1.0, "over": over}}, "variants": {"wide": {"num_experts": 6}},
    }  # fmt: skip
    config = dataclasses.replace(config, model=build(ModelConfig, settings, "model"))
    made = make_mesh(devices=jax.devices()[:1]) if mesh is None else make_mesh(mesh)
    return Trainer(config, made, config.train.objective.make())


def step(made: Trainer):
    """(gradients, balance loss of each layer) of one step from the same parameters."""
    data = jax.device_put(batch(), made.batch_sharding)
    run = jax.jit(made._gradients, in_shardings=(made.state_shardings, made.batch_sharding, None, None))
    gradients, stats = jax.device_get(run(made.init_state(), data, jnp.int32(0), jax.random.key(0)))
    return gradients, np.array([layer["load_balance"].value().item() for layer in stats["layers"].values()])


def test_global_balance_of_micro_batches_on_eight_devices_is_that_of_the_whole_batch_on_one():
    one, one_balance = step(trainer("global", 1))
    many, many_balance = step(trainer("global", 2, MeshConfig(data=8)))
    np.testing.assert_allclose(many_balance, one_balance, rtol=1e-5)
    for path, value in one.items():
        np.testing.assert_allclose(many[path], value, atol=1e-5 * np.abs(value).max() + 1e-7, err_msg=path)


def test_a_buffer_counts_this_micro_batch_and_those_before_it():
    M, made = 2, trainer("buffer", 2, layers=TWO)
    _, got = step(made)
    routed = jax.jit(lambda state, rows: forward(made.model(state), rows, train=True, record=True)[1].layers)
    counted, expected, alone = [0, 0], np.zeros(2), np.zeros(2)
    for m in range(M):
        rows = {name: value[m::M] for name, value in batch().items()}
        valid = rows["segment_ids"].reshape(-1) > 0
        terms = per_layer_terms(jax.device_get(routed(made.init_state(), rows)))
        for layer, (logits, experts) in enumerate(zip(terms["router_logits"], terms["router_experts"], strict=True)):
            E = logits.shape[1]
            own = np.bincount(experts[valid].ravel(), minlength=E)
            counted[layer] = counted[layer] + own
            P = np.stack([naive.softmax(z) for z in logits[valid].astype(np.float64)]).mean(0)
            expected[layer] += E * (counted[layer] / counted[layer].sum() * P).sum() / M
            alone[layer] += E * (own / own.sum() * P).sum() / M
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert np.abs(alone - expected).min() > 1e-4
