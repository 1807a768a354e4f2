"""Gradients through a whole decoder: what recomputation may change (memory only), and how losses reach the router."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from naive import tiny_model

from moe_zoo.core import param as P
from moe_zoo.train.objective import cross_entropy

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 12)), jnp.int32)
PARTS = ("task", "load_balance", "z_loss")
ROUTER = "segments.0.blocks.0.ffn.router.kernel"


@pytest.fixture(scope="module")
def compiled():
    """remat -> (executable of (values, weights of the parts) -> (loss, gradients), values)."""
    out = {}
    for remat in ("none", "dots", "block"):
        model = tiny_model(
            layers="1*moe", remat=remat, losses={"load_balance": {"coef": 0.5}, "z_loss": {"coef": 0.25}}
        )
        graphdef, _ = nnx.split(model)

        def loss(values, weights, model=model):
            logits, aux, _ = P.replace(model, values)(TOKENS, train=True)
            parts = {"task": cross_entropy(logits[:, :-1], TOKENS[:, 1:]).mean(), **aux.losses}
            return sum(weights[name] * parts[name] for name in PARTS)

        values = P.arrays(model)
        out[remat] = jax.jit(jax.value_and_grad(loss)).lower(values, only()).compile(), values
    return out


def only(*names):
    return {name: jnp.float32(name in names) for name in PARTS}


@pytest.mark.parametrize("remat", ["dots", "block"])
def test_recomputation_changes_no_gradient(compiled, remat):
    (plain, values), (remade, _) = compiled["none"], compiled[remat]
    (a, grads), (b, other) = plain(values, only(*PARTS)), remade(values, only(*PARTS))
    assert float(a) == pytest.approx(float(b), rel=1e-6)
    for name, grad in grads.items():
        np.testing.assert_allclose(other[name], grad, rtol=1e-3, atol=1e-6, err_msg=name)
        assert np.abs(grad).max() > 1e-6, name


@pytest.mark.usefixtures("unrolled")
def test_recomputing_blocks_saves_memory_in_short_segments_too():
    """Two layers fit into one unrolled body; there, too, only one layer's activations may be alive at once."""
    tokens, bytes_used = jnp.zeros((2, 96), jnp.int32), {}
    for remat in ("none", "block"):
        model = tiny_model(layers="2*dense", remat=remat)
        loss = lambda values, model=model: P.replace(model, values)(tokens, train=True)[0].sum()
        executable = jax.jit(jax.grad(loss)).lower(P.arrays(model)).compile()
        bytes_used[remat] = executable.memory_analysis().temp_size_in_bytes
    assert bytes_used["block"] < 0.8 * bytes_used["none"]


@pytest.mark.parametrize("name", ["load_balance", "z_loss"])
def test_router_losses_reach_the_router_with_their_coefficient(compiled, name):
    """Against differences of the loss itself along the gradient; what comes after the router gets nothing."""
    run, values = compiled["none"]
    _, grads = run(values, only(name))
    slope = np.asarray(grads[ROUTER])
    size = np.linalg.norm(slope)
    assert size > 1e-4
    step = 1e-2 * slope / size
    up, down = (float(run({**values, ROUTER: values[ROUTER] + s * step}, only(name))[0]) for s in (1, -1))
    assert (up - down) / 2e-2 == pytest.approx(size, rel=0.02)
    for path, grad in grads.items():
        assert not np.any(grad) or not path.startswith(("segments.0.blocks.0.ffn.experts", "norm", "head")), path


def test_task_loss_reaches_every_parameter(compiled):
    run, values = compiled["none"]
    _, grads = run(values, only("task"))
    assert not [path for path, grad in grads.items() if not np.any(grad)]
