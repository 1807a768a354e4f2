"""Switch: the raw probability as gate, and noise in training only."""

import functools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from naive import context, normal

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.routing.router import Dims
from moe_zoo.routing.switch import Switch, SwitchConfig

T, D, E = 64, 5, 6


@pytest.fixture(scope="module")
def switch():
    return P.materialize(Switch(SwitchConfig(jitter=0.3, init_std=1.0), Dims(num_experts=E, hidden_size=D)), 0)


@functools.partial(jax.jit, static_argnums=3)
def routed(switch, x, key, train, inputs):
    return switch(x, context(x.shape[0], train=train, key=key, inputs=inputs))


@pytest.fixture(scope="module")
def route(switch):
    def run(x, seed=0, train=False, switch=switch, inputs={}):  # noqa: B006
        return jax.device_get(routed(switch, x, jax.random.key(seed), train, inputs))

    return run


def test_gate_is_the_raw_probability_of_the_best_expert(switch, route):
    x = normal(0, T, D)
    logits = np.asarray(x, np.float64) @ np.asarray(switch.kernel[...], np.float64)
    experts, gates = naive.top_k(logits, 1, norm=False)
    decision = route(x).decision
    np.testing.assert_array_equal(decision.experts, experts)
    np.testing.assert_allclose(decision.gates, gates, rtol=2e-5)


def test_noise_acts_in_training_only_and_follows_the_key(route):
    x = normal(1, T, D)
    quiet, noisy = route(x, 0), route(x, 0, train=True)
    np.testing.assert_array_equal(route(x, 1).logits, quiet.logits)
    np.testing.assert_array_equal(route(x, 0, train=True).logits, noisy.logits)
    assert (noisy.logits != quiet.logits).mean() > 0.9
    assert (route(x, 1, train=True).logits != noisy.logits).mean() > 0.9


def test_noise_multiplies_each_input_by_at_most_its_width(route):
    """With the identity as kernel the logits are the noisy inputs themselves."""
    wide = P.materialize(Switch(SwitchConfig(jitter=0.3), Dims(num_experts=D, hidden_size=D)), 0)
    wide = P.replace(wide, {"kernel": jnp.eye(D)})
    factor = route(jnp.ones((T, D)), 2, True, wide).logits
    assert factor.min() >= 0.7 and factor.max() <= 1.3 and factor.std() == pytest.approx(0.6 / 12**0.5, rel=0.15)
    assert len(np.unique(factor)) > 0.9 * factor.size


def test_no_noise_is_asked_of_a_jitter_of_zero(route):
    still = P.materialize(Switch(SwitchConfig(jitter=0.0, init_std=1.0), Dims(num_experts=E, hidden_size=D)), 0)
    x = normal(3, T, D)
    np.testing.assert_array_equal(route(x, 0, True, still).logits, route(x, 0, False, still).logits)


def test_task_gradient_reaches_the_router(switch):
    x = normal(4, T, D)
    loss = lambda kernel: P.replace(switch, {"kernel": kernel})(x, context(T)).decision.gates.sum()
    assert np.abs(jax.jit(jax.grad(loss))(switch.kernel[...])).max() > 1e-2


def test_bias_from_outside_steers_the_selection_only(route):
    x, bias = normal(5, T, D), jnp.zeros(E).at[3].set(10.0)
    routing = route(x, inputs={"router_bias": bias})
    assert (routing.decision.experts == 3).all()
    np.testing.assert_array_equal(routing.decision.gates[:, 0], routing.probs[:, 3])


@pytest.mark.parametrize("settings", [dict(jitter=1.0), dict(jitter=-0.1), dict(init_std=0.0)])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=r"router\."):
        SwitchConfig(**settings).validate("router")
