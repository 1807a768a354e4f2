"""Router losses against their formulas by loop, and their way to the router's weights."""

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from naive import context, normal, tiny_config

from moe_zoo.blocks.moe import MoE
from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.losses.load_balance import LoadBalanceConfig, load_balance
from moe_zoo.losses.z_loss import ZLossConfig, z_loss

T, E, K = 11, 5, 2
VALID = np.random.default_rng(5).random(T) < 0.6


def case(seed=0):
    logits = np.asarray(normal(seed, T, E), np.float64)
    experts, _ = naive.top_k(logits, K)
    return logits, experts, np.stack([naive.softmax(z) for z in logits])


def counts(experts, valid=None):
    used = experts if valid is None else experts[valid]
    return jnp.asarray(np.bincount(used.ravel(), minlength=E))


@pytest.mark.parametrize("valid", [None, VALID])
def test_load_balance_is_the_formula(valid):
    _, experts, probs = case()
    got = load_balance(
        jnp.asarray(probs, jnp.float32), counts(experts, valid), None if valid is None else jnp.asarray(valid)
    )
    assert float(got) == pytest.approx(naive.load_balance(probs, experts, valid), rel=1e-5)


def test_load_balance_is_one_for_a_uniform_router_and_e_for_a_collapsed_one():
    _, experts, _ = case()
    assert float(load_balance(jnp.full((T, E), 1 / E), counts(experts))) == pytest.approx(1, rel=1e-6)
    one_hot = jnp.zeros((T, E)).at[:, 2].set(1.0)
    assert float(load_balance(one_hot, jnp.zeros(E, int).at[2].set(T))) == pytest.approx(E, rel=1e-6)


def test_load_balance_is_one_when_only_the_load_is_even():
    _, _, probs = case()
    assert float(load_balance(jnp.asarray(probs, jnp.float32), jnp.full(E, 7))) == pytest.approx(1, rel=1e-6)


def test_load_balance_gradient_is_the_load_and_none_goes_through_the_counts():
    _, experts, probs = case()
    load = counts(experts).astype(jnp.float32)
    by_probs, by_counts = jax.jit(jax.grad(load_balance, (0, 1)))(jnp.asarray(probs, jnp.float32), load)
    np.testing.assert_allclose(by_probs, np.broadcast_to(E * load / load.sum() / T, (T, E)), rtol=1e-5)
    assert not by_counts.any()


@pytest.mark.parametrize("valid", [None, VALID])
def test_z_loss_is_the_formula(valid):
    logits, _, _ = case()
    got = z_loss(jnp.asarray(logits, jnp.float32), None if valid is None else jnp.asarray(valid))
    assert float(got) == pytest.approx(naive.z_loss(logits, valid), rel=1e-5)


def test_z_loss_gradient_is_two_over_t_lse_p():
    logits, _, probs = case()
    got = jax.jit(jax.grad(z_loss))(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(got, 2 / T * np.log(np.exp(logits).sum(-1, keepdims=True)) * probs, rtol=1e-4)


def test_z_loss_sees_a_shift_that_the_probabilities_do_not():
    assert float(z_loss(jnp.full((3, E), -np.log(E)))) == pytest.approx(0, abs=1e-9)
    assert float(z_loss(jnp.zeros((3, E)))) == pytest.approx(np.log(E) ** 2, rel=1e-5)


@pytest.mark.parametrize(
    "loss", [lambda z, v: z_loss(z, v), lambda z, v: load_balance(jax.nn.softmax(z), jnp.arange(E), v)]
)
def test_padding_changes_neither_value_nor_gradient(loss):
    logits, _, _ = case()
    valid, noisy = jnp.asarray(VALID), np.where(VALID[:, None], logits, 1e3 * logits)
    both = jax.jit(jax.value_and_grad(loss))
    (a, ga), (b, gb) = (both(jnp.asarray(z, jnp.float32), valid) for z in (logits, noisy))
    assert float(a) == pytest.approx(float(b), rel=1e-6)
    np.testing.assert_allclose(ga, gb, rtol=1e-5)
    assert not np.asarray(gb)[~VALID].any()


def test_no_valid_token_means_no_loss():
    nothing = jnp.zeros(T, bool)
    assert float(z_loss(jnp.ones((T, E)), nothing)) == 0
    assert float(load_balance(jnp.full((T, E), 1 / E), jnp.zeros(E, int), nothing)) == 0


def test_router_weights_get_the_gradient_of_each_loss_times_its_coefficient():
    """Through a whole routed layer, with padding: the gradient equals that of the formula on `x W`."""
    B, S, D = 2, 6, 7
    losses = {"load_balance": {"coef": 0.5}, "z_loss": {"coef": 0.25}}
    layer = MoE(tiny_config(num_experts=E, hidden_size=16, losses=losses).moe(), hidden_size=D, out_scale=1.0)
    layer = P.materialize(layer, 0)
    x, valid = normal(1, B, S, D), jnp.arange(B * S) % 5 > 0
    ctx = context(B * S, batch=B, valid=valid, train=True)

    @jax.jit
    def ours(values, weights):
        def loss(values):
            _, aux, _ = P.replace(layer, values)(x, ctx)
            return sum(weights[n] * aux.losses[n] for n in losses), aux

        return jax.grad(loss, has_aux=True)(values)

    x_TD, kernel = x.reshape(-1, D), layer.router.kernel[...]
    experts = naive.top_k(np.asarray(x_TD, np.float64) @ np.asarray(kernel, np.float64), K)[0]
    load = counts(experts, np.asarray(valid))
    formulas = {
        "load_balance": lambda w: 0.5 * load_balance(jax.nn.softmax(x_TD @ w), load, valid),
        "z_loss": lambda w: 0.25 * z_loss(x_TD @ w, valid),
    }
    for name, formula in formulas.items():
        grads, aux = ours(P.arrays(layer), {n: float(n == name) for n in losses})
        value, expected = jax.jit(jax.value_and_grad(formula))(kernel)
        np.testing.assert_allclose(grads["router.kernel"], expected, rtol=1e-4, atol=1e-6)
        assert np.abs(expected).max() > 1e-3
        assert not any(np.any(g) for n, g in grads.items() if n != "router.kernel")
        assert float(aux.losses[name]) == pytest.approx(float(value), rel=1e-5)
        assert float(aux.stats[name].value()) == pytest.approx(float(value) / losses[name]["coef"], rel=1e-5)


@pytest.mark.parametrize("config", [LoadBalanceConfig, ZLossConfig])
def test_negative_coefficients_are_refused(config):
    with pytest.raises(ConfigError, match=r"losses\.x\.coef"):
        config(coef=-1.0).validate("losses.x")
