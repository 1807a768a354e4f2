"""The GPU's kernels of causal attention: interpreted against the blocks that XLA gets, and where they are chosen."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from moe_zoo.core.sight import Sight
from moe_zoo.layers import attend
from pallas_kernels import causal_attention

B, N, M, S, H = 2, 4, 2, 64, 16


def a_sight(chunk=None) -> Sight:
    """Two documents in the first row, padding behind the second row's."""
    segments = np.ones((B, S), np.int32)
    segments[0, 20:], segments[1, 50:] = 2, 0
    positions = np.tile(np.arange(S, dtype=np.int32), (B, 1))
    positions[0, 20:] -= 20
    positions[1] -= 30
    places = jnp.asarray(positions)
    return Sight(places, places, jnp.asarray(segments), jnp.asarray(segments > 0), chunk=chunk)


@pytest.mark.parametrize(("window", "chunk", "queries", "keys"), [(None, None, 16, 32), (5, 8, 32, 16)])
def test_equals_the_blocks_in_value_and_gradient(window, chunk, queries, keys):
    rng, sight = np.random.default_rng(0), a_sight(chunk)
    draw = lambda heads: jnp.asarray(rng.normal(size=(B, heads, S, H)), jnp.float32)
    q, k, v, seen = draw(N), draw(M), draw(M), sight.key_valid[:, None, :, None]
    # what nobody sees may hold anything that is finite: the gradient of a query that sees nothing is zero
    g = jnp.where(seen, draw(N), 0)
    tokens = attend._tokens(sight, window)
    how = dict(scale=0.3, blocks=causal_attention.Blocks(queries, keys, 4, 2), interpret=True)

    @jax.jit
    def both(q, k, v, g):
        out, pull = jax.vjp(lambda *x: attend.attend_causally(*x, None, sight, window, 0.3), q, k, v)
        ours, *kept = causal_attention.forward(q, k, v, tokens, **how)
        return (out, *pull(g)), (ours, *causal_attention.gradients(q, k, v, tokens, ours, *kept, g, **how))

    (out, *expected), (ours, *got) = both(q, k, v, g)
    np.testing.assert_allclose(jnp.where(seen, ours, 0), jnp.where(seen, out, 0), atol=2e-6)
    assert not jnp.any(jnp.where(seen, 0, ours))
    for mine, theirs in zip(got, expected):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_runs_by_name():
    rng, sight = np.random.default_rng(0), a_sight()
    q, k, v = (jnp.asarray(rng.normal(size=(B, heads, S, H)), jnp.bfloat16) for heads in (N, M, M))
    run = lambda name: attend.attend_causally(q, k, v, None, sight, None, None, name).astype(jnp.float32)
    seen = sight.key_valid[:, None, :, None]
    np.testing.assert_allclose(jnp.where(seen, run("pallas_gpu") - run("xla"), 0), 0, atol=0.03)
    with pytest.raises(NotImplementedError, match="attend_causally: .* it has no sinks. Available now: xla"):
        attend.attend_causally(q, k, v, jnp.zeros(N), sight, None, None, "pallas_gpu")


def on_gpu(known: bool):
    if not known:
        return contextlib.nullcontext()
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


@pytest.mark.parametrize(
    ("known", "devices", "dtype", "kernels"),
    [(True, 1, jnp.bfloat16, 3), (True, 1, jnp.float32, 0), (True, 2, jnp.bfloat16, 0), (False, 1, jnp.bfloat16, 0)],
)
def test_chosen_where_one_gpu_is_known(known, devices, dtype, kernels, monkeypatch):
    """Forward and the two of the backward pass; bfloat16 only."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    shapes = [jax.ShapeDtypeStruct((B, heads, S, H), dtype) for heads in (N, M, M)]
    step = jax.grad(lambda *x: attend.attend_causally(*x, None, a_sight()).astype(jnp.float32).sum(), (0, 1, 2))
    with on_gpu(known):
        text = jax.jit(step).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == kernels


def test_says_what_it_does_not_take():
    shape = lambda S, H, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((1, 2, S, H), dtype)
    why_not = lambda *given: causal_attention.why_not(*[shape(*given)] * 3)
    assert why_not(64, 64) is None
    assert "bfloat16" in why_not(64, 64, jnp.float32)
    assert "multiples of 64 tokens, not 100" in why_not(100, 64)
    assert "heads of 16, 32, 64 or 128 numbers, not 96" in why_not(64, 96)
