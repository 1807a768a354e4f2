"""Chain-of-Experts: iterations against a loop in numpy, what one iteration is equal to, residuals, buffers, counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import context, moe, normal, tiny_config, tiny_model, top_k

from moe_zoo.blocks.chain import Chain, ChainConfig
from moe_zoo.blocks.moe import MoE
from moe_zoo.core import param as P
from moe_zoo.core.aux import Stat
from moe_zoo.core.registry import ConfigError
from moe_zoo.layers.attention import View
from moe_zoo.models.counting import count_parameters, router_parameters
from moe_zoo.sharding import MeshConfig, make_mesh

T, D, E, K = 24, 16, 4, 2
RAW = {"name": "top_k", "num_experts_per_tok": K, "init_std": 1.0, "norm_topk_prob": False}
PAPER = {"iterations": 2, "inner_residual": True, "outer_residual": False}
call = jax.jit(lambda layer, x, ctx: layer(x, ctx))


@functools.cache
def chain(iterations=2, inner=True, own=True, **router) -> Chain:
    config = tiny_config(router={**RAW, **router}, losses={"load_balance": {}}).moe()
    settings = ChainConfig(iterations, own, inner, outer_residual=not inner)
    return P.materialize(Chain(config, settings, hidden_size=D, out_scale=1.0), 0)


def loop(layer: Chain, x_TD):
    """(y, [experts of each iteration]), an iteration, a token and an expert at a time."""
    weights = tuple(np.asarray(w[...]) for w in (layer.experts.w_gate, layer.experts.w_up, layer.experts.w_down))
    x, chosen = np.asarray(x_TD, np.float64), []
    for router in layer.routers():
        experts, gates = top_k(x @ np.asarray(router.kernel[...], np.float64), K, norm=False)
        m = moe(x, experts, gates, weights)
        x = m + x if layer.chain.inner_residual else m
        chosen.append(experts)
    return x, chosen


@pytest.mark.parametrize("inner, own", [(True, True), (False, True), (True, False)])
def test_output_is_that_of_the_loop(inner, own):
    layer, x = chain(3, inner, own), normal(0, T, D)
    y, aux, _ = call(layer, x[None], context(T, record=True))
    expected, chosen = loop(layer, x)
    np.testing.assert_allclose(y[0], expected, atol=2e-4)
    np.testing.assert_array_equal(aux.terms["router_experts"], np.concatenate(chosen, 1))
    counts = np.stack([np.bincount(e.reshape(-1), minlength=E) for e in chosen])
    np.testing.assert_array_equal(aux.stats["load_by_iteration"].total, counts)
    np.testing.assert_array_equal(aux.stats["load"].total, counts.sum(0))
    assert float(aux.stats["experts_per_token"].value()) == K
    assert any((a != b).any() for a, b in zip(chosen, chosen[1:])), "iterations must choose anew"
    assert len(P.flat(layer)) == 3 + (3 if own else 1)


def test_one_iteration_is_the_plain_layer_to_the_bit():
    plain = P.materialize(MoE(tiny_config(router=RAW).moe(), hidden_size=D, out_scale=1.0), 0)
    x, ctx = normal(1, 1, T, D), context(T)
    same, (y, aux, _) = chain(1, inner=False), call(plain, x, ctx)
    assert P.flat(same).keys() == P.flat(plain).keys()
    ours, chained, _ = call(same, x, ctx)
    np.testing.assert_array_equal(ours, y)
    np.testing.assert_array_equal(chained.losses["load_balance"], aux.losses["load_balance"])
    np.testing.assert_allclose(call(chain(1), x, ctx)[0], x + y, atol=1e-6)  # the authors' baseline


def test_experts_that_give_nothing_leave_the_inner_residual():
    layer, x = chain(3), normal(2, 1, T, D)
    off = P.replace(layer, {**P.arrays(layer), "experts.w_down": jnp.zeros_like(layer.experts.w_down[...])})
    np.testing.assert_array_equal(call(off, x, context(T))[0], x)


def test_losses_and_gradients_are_those_of_all_routers():
    layer, x, ctx = chain(2), normal(3, 1, T, D), context(T)
    values = P.arrays(layer)

    def total(values):
        y, aux, _ = P.replace(layer, values)(x, ctx)
        return jnp.sin(y).sum() + aux.total_loss()

    for path, gradient in jax.jit(jax.grad(total))(values).items():
        assert float(jnp.abs(gradient).max()) > 1e-4, f"no gradient reaches {path}"
    first, second = (P.replace(chain(1), {n: values[n if k == 0 else n.replace("router", "later.0.router")]
                                          for n in P.arrays(chain(1))}) for k in (0, 1))  # fmt: skip
    y, one, _ = call(first, x, ctx)
    _, two, _ = call(second, y, ctx)
    both = call(layer, x, ctx)[1].losses["load_balance"]
    np.testing.assert_allclose(both, one.losses["load_balance"] + two.losses["load_balance"], rtol=1e-5)


def test_each_router_moves_its_bias_by_its_own_load():
    layer = chain(2, score_function="sigmoid", correction_bias=True, bias_update_rate=0.01)
    loads = jnp.asarray([[9.0, 1, 1, 1], [1, 1, 1, 9]])
    stats = {"load": Stat.sum(loads.sum(0)), "load_by_iteration": Stat.sum(loads)}
    new = layer.after_step(stats)
    assert new.keys() == {"router.correction", "later.0.router.correction"}
    np.testing.assert_allclose(new["router.correction"], [-0.01, 0.01, 0.01, 0.01])
    np.testing.assert_allclose(new["later.0.router.correction"], [0.01, 0.01, 0.01, -0.01])


def test_a_mesh_changes_neither_values_nor_gradients():
    layer, x = chain(2), normal(4, 8, 3, D)
    mixed = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))

    def total(x, layer, mesh):
        y, aux, _ = layer(x, context(T, batch=8, mesh=mesh))
        return jnp.sin(y).sum() + aux.total_loss()

    grad = jax.jit(jax.value_and_grad(total, argnums=(0, 1)), static_argnums=2)
    for one, many in zip(*(jax.tree.leaves(grad(x, layer, m)) for m in (None, mixed)), strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-4, atol=2e-5)


def test_a_decoder_of_chains_adds_routers_only_and_decodes_as_it_reads():
    model, plain = (tiny_model(router=RAW, layers="2*moe", **more) for more in ({"chain": PAPER}, {}))
    assert router_parameters(model) == 2 * router_parameters(plain) == 2 * 2 * D * E
    more = count_parameters(model)["total"] - count_parameters(plain)["total"]
    assert more == 2 * D * E
    assert count_parameters(model)["active"] > count_parameters(plain)["active"] + more  # four experts, not two
    rows = lambda m: m.flops_per_token(1.0)
    assert rows(model) - rows(plain) == 2 * (2 * D * E + K * 6 * D * 8)
    ids = np.random.default_rng(0).integers(0, 32, (2, 7)).astype(np.int32)
    read = jax.jit(lambda ids: model(ids)[0])
    whole = read(ids)
    changed = ids.copy()
    changed[:, -1] += 1
    np.testing.assert_allclose(read(changed % 32)[:, :-1], whole[:, :-1], atol=1e-5)
    cache, parts = model.init_cache(2, 8), []
    step = jax.jit(lambda ids, cache: model(ids, cache=cache)[::2])
    for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:]):
        logits, cache = step(part, cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=2e-5)


def test_without_outer_residual_the_stream_is_the_normed_one():
    """Silent experts: what comes out of the block is norm(h), as in the authors' code, and not h + norm(h)."""
    outputs = {}
    for outer in (False, True):
        model = tiny_model(router=RAW, layers="1*moe", chain={**PAPER, "outer_residual": outer})
        block = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)[0]), model.segments[0].blocks[0])
        assert block.outer_residual == outer
        block = P.replace(block, {n: 0 * v if n.endswith("w_down") else v for n, v in P.arrays(block).items()})
        block.mixer = lambda x, view, cache, at: (jnp.zeros_like(x), cache)
        x = normal(5, 1, T, D)
        outputs[outer] = block(x, View(jnp.zeros(x.shape[:2], jnp.int32)), context(T))[0]
        normed = block.ffn_norm(x)
    np.testing.assert_allclose(outputs[False], normed, atol=1e-6)
    np.testing.assert_allclose(outputs[True], x + normed, atol=1e-6)


def test_what_cannot_be_chained_is_refused():
    with pytest.raises(ConfigError, match="model.chain.iterations.*> 0"):
        tiny_config(chain={"iterations": 0})
    with pytest.raises(ConfigError, match="model.chain.outer_residual.*inner_residual=true"):
        tiny_config(chain={"outer_residual": False})
    with pytest.raises(ValueError, match="given decision.*2 iterations"):
        chain(2)(normal(0, 1, T, D), context(T, inputs={"given": None}))
