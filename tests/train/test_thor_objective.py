"""THOR's objective: the loss by hand, its two ends (one expert, alpha 0), whose experts get gradient, micro-batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import tiny_model

from moe_zoo.core import param as P
from moe_zoo.models.counting import train_flops_per_token
from moe_zoo.train.objective import OBJECTIVES, NextToken, NextTokenConfig, forward
from moe_zoo.train.thor import Thor, ThorConfig, symmetric_kl

B, S, E, V = 4, 8, 4, 32
KEY = jax.random.key(4)  # one with which the two passes draw different experts


@functools.cache
def model(num_experts: int = E):
    return tiny_model(layers="1*moe", num_experts=num_experts, losses={}, router={"name": "thor"})


@functools.cache
def batch() -> dict:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (B, S + 1)).astype(np.int32)
    segments = np.ones((B, S), np.int32)
    segments[0, 5:] = 0  # padding
    counts = (segments > 0) & (rng.random((B, S)) < 0.8)
    return {
        "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments, "domain": np.zeros_like(segments),
        "positions": np.tile(np.arange(S, dtype=np.int32), (B, 1)),
        "loss_weights": (counts / counts.sum()).astype(np.float32),
    }  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def compiled(plain: bool, whole, data, share, alpha):
    """((loss, statistics), {path: gradient}) of a part of the batch."""
    objective = NextToken(NextTokenConfig()) if plain else Thor(ThorConfig(alpha))

    def loss(trained):
        changed = P.replace(whole, trained)
        return objective.loss(changed, data, {}, step=jnp.int32(0), key=KEY, fraction=share)

    return jax.value_and_grad(loss, has_aux=True)(P.arrays(whole))


def run(alpha: float | None, num_experts: int, rows=tuple(range(B))):
    """Of these rows, with `alpha`; None: the plain objective."""
    data = {name: value[list(rows)] for name, value in batch().items()}
    return compiled(alpha is None, model(num_experts), data, len(rows) / B, alpha or 0.0)


def scalars(stats) -> dict[str, float]:
    return {name: float(stat.value()) for name, stat in stats["scalars"].items()}


def random_logits(seed: int, scale: float = 3.0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((B, S, V)) * scale, jnp.float32)


@pytest.mark.parametrize("chunk", [10**9, 3 * B * V, 1])
def test_symmetric_kl_equals_both_divergences_however_it_is_cut(chunk):
    """3 B V logits at a time: two places of eight, as three do not divide them."""
    a, b = random_logits(0), random_logits(1)
    counts = np.random.default_rng(2).random((B, S)) < 0.7
    p, q = (np.exp(np.float64(z) - np.log(np.exp(np.float64(z)).sum(-1, keepdims=True))) for z in (a, b))
    expected = 0.5 * ((p * np.log(p / q)).sum(-1) + (q * np.log(q / p)).sum(-1)) * counts
    kl = functools.partial(symmetric_kl, counts_BS=jnp.asarray(counts), chunk=chunk)
    np.testing.assert_allclose(kl(a, b), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(kl(a, b), kl(b, a))
    np.testing.assert_array_equal(kl(a, a), 0)
    assert float(kl(a, b + 5).min()) >= 0
    # both sides get gradient; of the first it is 1/2 p (r - <r>_p) + 1/2 (p - q), r = log p - log q
    gradients = jax.grad(lambda a, b: kl(a, b).sum(), argnums=(0, 1))(a, b)
    for (x, y), gradient in zip(((p, q), (q, p)), gradients, strict=True):
        r = np.log(x / y)
        by_hand = 0.5 * (x * (r - (x * r).sum(-1, keepdims=True)) + x - y) * counts[..., None]
        np.testing.assert_allclose(gradient, by_hand, rtol=1e-3, atol=1e-6)


def test_probabilities_that_underflow_and_half_precision_are_finite():
    far = jnp.zeros((B, S, V)).at[..., 0].set(500.0)
    counts = jnp.ones((B, S), bool)
    value, gradient = jax.value_and_grad(lambda a: symmetric_kl(a, -far, counts).mean())(far)
    assert np.isfinite(float(value)) and float(value) > 100 and bool(jnp.isfinite(gradient).all())
    a, b = (random_logits(seed).astype(jnp.bfloat16) for seed in (0, 1))
    assert symmetric_kl(a, b, counts).dtype == jnp.float32
    np.testing.assert_array_equal(
        symmetric_kl(a, b, counts), symmetric_kl(a.astype(jnp.float32), b.astype(jnp.float32), counts)
    )


def test_the_loss_is_that_of_two_passes_by_hand():
    (loss, stats), _ = run(5.0, E)
    data, passes = batch(), []
    logits_of = jax.jit(lambda model, key: forward(model, batch(), train=True, step=jnp.int32(0), key=key)[0])
    for number in (0, 1):
        logits = logits_of(model(), jax.random.fold_in(KEY, number))
        z = np.float64(logits)
        passes.append(z - np.log(np.exp(z).sum(-1, keepdims=True)))
    ce, kl, weights = [0.0, 0.0], 0.0, data["loss_weights"]
    for b, s in np.ndindex(B, S):
        for number in (0, 1):
            ce[number] -= weights[b, s] * passes[number][b, s, data["targets"][b, s]]
        log_p, log_q = passes[0][b, s], passes[1][b, s]
        kl += weights[b, s] * 0.5 * ((np.exp(log_p) - np.exp(log_q)) * (log_p - log_q)).sum()
    assert float(loss) == pytest.approx(sum(ce) + 5 * kl, rel=1e-5)
    assert ce[0] != pytest.approx(ce[1], rel=1e-6) and kl > 1e-6
    said = scalars(stats)
    assert said["loss"] == pytest.approx(sum(ce) / 2, rel=1e-5) and said["consistency"] == pytest.approx(kl, rel=1e-4)


def test_one_expert_agrees_with_itself_and_is_twice_the_plain_loss():
    (loss, stats), gradient = run(5.0, 1)
    (plain, _), plain_gradient = run(None, 1)
    assert scalars(stats)["consistency"] == 0
    assert float(loss) == pytest.approx(2 * float(plain), rel=1e-6)
    for path, value in plain_gradient.items():
        np.testing.assert_allclose(gradient[path], 2 * value, atol=1e-6, err_msg=path)


def test_only_drawn_experts_get_gradient_and_alpha_zero_is_random_routing():
    (loss, stats), gradient = run(5.0, E)
    load_RE = np.asarray(stats["layers"]["segments.0.blocks.0"]["load"].total)
    valid = int((batch()["segment_ids"] > 0).sum())
    assert (load_RE.sum(1) == 2 * valid).all() and (np.isin(load_RE, (0, valid, 2 * valid))).all()
    assert (load_RE == 0).any()
    for name in ("w_gate", "w_up", "w_down"):
        size_RE = np.abs(np.asarray(gradient[f"segments.0.blocks.0.ffn.experts.{name}"])).max((2, 3))
        np.testing.assert_array_equal(size_RE > 0, load_RE > 0)
    (indifferent, stats), _ = run(0.0, E)
    assert float(indifferent) == pytest.approx(2 * scalars(stats)["loss"], rel=1e-6) and float(loss) > float(
        indifferent
    )


def test_micro_batches_add_up_to_the_batch():
    """The same key is the same draw for the whole batch, so halves of it are comparable with all of it."""
    (loss, stats), gradient = run(5.0, E)
    halves = [run(5.0, E, rows) for rows in ((0, 2), (1, 3))]
    assert sum(float(half[0][0]) for half in halves) == pytest.approx(float(loss), rel=1e-5)
    for name, value in scalars(stats).items():
        assert sum(scalars(half[0][1])[name] for half in halves) == pytest.approx(value, rel=1e-4, abs=1e-7)
    for path, value in gradient.items():
        np.testing.assert_allclose(halves[0][1][path] + halves[1][1][path], value, atol=2e-6, err_msg=path)


def test_two_passes_cost_twice():
    passes = {name: OBJECTIVES.get(name).passes for name in OBJECTIVES.names()}
    assert passes.pop("thor") == passes.pop("distill") == 2 and set(passes.values()) == {1}
    assert train_flops_per_token(model(), S, passes=2) == 2 * train_flops_per_token(model(), S)
