"""Chunked recurrences against loops over tokens, with states before them, packed documents, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import normal

from moe_zoo.mixers.conv import causal_conv
from moe_zoo.mixers.delta_rule import delta_rule, unit
from moe_zoo.mixers.linear_attention import linear_attention
from moe_zoo.mixers.mixer import Span
from moe_zoo.mixers.selective_scan import selective_scan

B, S, G, H, N, P = 2, 23, 2, 4, 5, 3
#: documents of 4, 1, 9 and 9 tokens: starts at, before and inside of chunks of 7
DOCUMENTS = np.repeat([0, 1, 2, 3], [4, 1, 9, 9])[None].repeat(B, 0)


def inputs(kind):
    """What the function takes and its loop, in which a token at a time reads, decays and writes the state."""
    heads = G if kind == "linear" else H
    q, k, v = normal(0, B, S, heads, N), unit(normal(1, B, S, heads, N)), normal(2, B, S, H, P)
    decay = -jnp.exp(normal(3, B, S, H, *([N] if kind == "channels" else [])))
    state = normal(4, B, H, N, P)
    if kind == "linear":
        return linear_attention, (q, k, v, decay, state)
    return delta_rule, (q, k, v, jax.nn.sigmoid(normal(5, B, S, H)), decay, state)


def loop(args, documents=None):
    """In jnp, so that it has gradients; a new document begins with an empty state."""
    q, k, v, *beta, decay, state = args
    q, k = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (q, k))
    ys = []
    for t in range(S):
        if documents is not None and t and documents[0, t] != documents[0, t - 1]:
            state = state * 0
        d = jnp.exp(decay[:, t])
        state = state * (d if d.ndim == 3 else d[..., None])[..., None]
        new = v[:, t]
        if beta:
            new = (new - jnp.einsum("bhn,bhnp->bhp", k[:, t], state)) * beta[0][:, t, :, None]
        state = state + k[:, t, ..., None] * new[:, :, None]
        ys.append(jnp.einsum("bhn,bhnp->bhp", q[:, t], state))
    return jnp.stack(ys, 1), state


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["linear", "delta", "channels"])
def test_in_chunks_it_is_the_loop_with_the_same_gradients(kind, packed):
    function, args = inputs(kind)
    documents = jnp.asarray(DOCUMENTS) if packed else None
    weigh = lambda out: jnp.sum(out[0] * normal(6, *out[0].shape)) + jnp.sum(out[1] * normal(7, *out[1].shape))
    value = lambda f: jax.jit(jax.value_and_grad(lambda args: (weigh(out := f(args)), out), has_aux=True))
    (_, expected), gradients = value(lambda args: loop(args, DOCUMENTS if packed else None))(args)
    (_, found), mine = value(lambda args: function(*args, documents, chunk=7))(args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), found, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), mine, gradients)
    assert all(np.abs(np.asarray(g)).max() > 1e-2 for g in jax.tree.leaves(mine))


@pytest.mark.parametrize("kind", ["linear", "delta", "channels"])
def test_token_by_token_it_is_the_loop(kind):
    function, (*args, state) = inputs(kind)
    expected, last = loop((*args, state))
    step = jax.jit(lambda args, state: function(*args, state))
    for t in range(S):
        y, state = step([x[:, t : t + 1] for x in args], state)
        np.testing.assert_allclose(y[:, 0], expected[:, t], rtol=0, atol=2e-5)
    np.testing.assert_allclose(state, last, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["delta", "channels"])
def test_strong_decays_and_long_texts_stay_finite(kind):
    function, (q, k, v, beta, decay, state) = inputs(kind)
    long = lambda x: jnp.tile(x, (1, 20, *(1,) * (x.ndim - 2)))
    args = (*map(long, (q, k, v, beta)), 40 * long(decay))
    grads = jax.jit(jax.grad(lambda args: function(*args, state)[0].sum()))(args)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_the_selective_scan_is_the_loop_with_the_same_gradients():
    args = (normal(0, B, S, P), jax.nn.softplus(normal(1, B, S, P)), -jnp.exp(normal(2, P, N)), normal(3, B, S, N),
            normal(4, B, S, N), normal(5, B, P, N))  # fmt: skip

    def naive(x, dt, A, b, c, state):
        ys = []
        for t in range(S):
            if t and DOCUMENTS[0, t] != DOCUMENTS[0, t - 1]:
                state = state * 0
            state = jnp.exp(dt[:, t, :, None] * A) * state + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
            ys.append((state * c[:, t, None]).sum(-1))
        return jnp.stack(ys, 1), state

    weigh = lambda out: jnp.sum(out[0] * normal(6, *out[0].shape)) + jnp.sum(out[1] * normal(7, *out[1].shape))
    value = lambda f: jax.jit(jax.value_and_grad(lambda args: (weigh(out := f(*args)), out), has_aux=True))
    (_, expected), gradients = value(naive)(args)
    (_, found), mine = value(lambda *args: selective_scan(*args, jnp.asarray(DOCUMENTS), chunk=7))(args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), found, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), mine, gradients)


@pytest.mark.parametrize("K", [2, 4, 30])
def test_the_convolution_sees_its_own_document_and_keeps_its_last_inputs(K):
    x, kernel, bias, state = normal(0, B, S, P), normal(1, P, K), normal(2, P), normal(3, B, K - 1, P)
    count = np.array([S, 6])
    y, new = jax.jit(causal_conv)(x, kernel, bias, Span(count=jnp.asarray(count)), state)
    packed, _ = jax.jit(causal_conv)(x, kernel, bias, Span(documents=jnp.asarray(DOCUMENTS)), state * 0)
    everything = np.concatenate([state, x], 1)
    for b in range(B):
        np.testing.assert_allclose(new[b], everything[b, count[b] : count[b] + K - 1])
        for t in range(S):
            window = everything[b, t : t + K]
            np.testing.assert_allclose(y[b, t], (window * np.asarray(kernel).T).sum(0) + bias, rtol=0, atol=1e-5)
            own = [j for j in range(K) if 0 <= t - (K - 1) + j and DOCUMENTS[b, t - (K - 1) + j] == DOCUMENTS[b, t]]
            expected = sum((everything[b, t + j] * np.asarray(kernel)[:, j] for j in own), np.asarray(bias))
            np.testing.assert_allclose(packed[b, t], expected, rtol=0, atol=1e-5)
