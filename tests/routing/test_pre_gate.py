"""Pre-gating: the small transformer against loops, routes that are one for all layers, and what teaches them."""

import dataclasses

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from flax import nnx
from naive import context, jitted, normal, tiny_config, tiny_model

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.losses.route_targets import RouteTargetsConfig, route_targets
from moe_zoo.models import Decoder
from moe_zoo.models.decoder import per_layer_terms
from moe_zoo.routing.pre_gate import PreGateConfig, PreGateNetwork
from moe_zoo.routing.router import Dims

B, S, V, E, SIZE, HEADS = 2, 7, 32, 4, 8, 2
IDS = np.random.default_rng(0).integers(0, V, (B, S)).astype(np.int32)
LAYERS = "1*moe 1*dense 2*moe"  # three routed ones
ROUTER = {"name": "pre_gate", "size": SIZE}


def made(**settings) -> PreGateNetwork:
    return P.materialize(PreGateNetwork(PreGateConfig(size=SIZE, **settings), Dims(E, 1, V)), 0)


def shaken(network):
    """Biases and scales that are not what they begin with."""
    change = lambda i, a: a + 0.3 * normal(i, *a.shape) if a.ndim == 1 else a
    return P.replace(network, {name: change(i, a) for i, (name, a) in enumerate(P.arrays(network).items())})


before = jax.jit(lambda network, ctx, cache=None: network.before_layers(ctx, cache))


def ids_context(ids=IDS, **fields):
    flat = {name: jnp.asarray(value).reshape(-1) for name, value in fields.items()}
    return context(ids.size, batch=len(ids), token_ids=jnp.asarray(ids.reshape(-1)), **flat)


@pytest.mark.parametrize("settings", [{}, {"attn_normalizer": 1.0}, {"reads": "token"}], ids=str)
def test_network_equals_loops_over_tokens(settings):
    network = shaken(made(**settings))
    segments = np.array([[1] * S, [1, 1, 1, 2, 2, 2, 2]])
    positions = np.array([np.arange(S), [0, 1, 2, 0, 1, 2, 3]])
    logits, _ = before(network, ids_context(segment_ids=segments, positions=positions))
    w = {name: np.asarray(a, np.float64) for name, a in P.arrays(network).items()}
    sees = lambda b, i, j: j <= i and segments[b, i] == segments[b, j]
    h = w["embed.table"][IDS]
    for block in (f"blocks.{i}." for i in range(2)):
        if "reads" not in settings:
            q, k, v, o = (w[f"{block}mixer.{name}"] for name in "qkvo")
            # a bias is one more input that is always 1
            biases = (w[f"{block}mixer.{name}_bias"].reshape(1, HEADS, -1) for name in "qkv")
            q, k, v = (np.concatenate(pair) for pair in zip((q, k, v), biases, strict=True))
            normed = naive.rms_norm(h, w[f"{block}mixer_norm.scale"], 1e-6)
            scale = np.sqrt(SIZE // HEADS) / settings["attn_normalizer"] if settings else 1.0
            wide, o = np.concatenate([normed, np.ones((B, S, 1))], -1), np.pad(o, ((0, 0), (0, 0), (0, 1)))
            h = h + naive.attention(wide, q * scale, k, v, o, sees, positions, 10_000.0)[..., :-1]
            h = h + w[f"{block}mixer.o_bias"]
        normed = naive.rms_norm(h, w[f"{block}ffn_norm.scale"], 1e-6)
        hidden = naive.silu(normed @ w[f"{block}ffn.w_up"] + w[f"{block}ffn.b_up"])
        h = h + hidden @ w[f"{block}ffn.w_down"] + w[f"{block}ffn.b_down"]
    expected = naive.rms_norm(h, w["norm.scale"], 1e-6) @ w["kernel"] + w["bias"]
    np.testing.assert_allclose(logits, expected.reshape(B * S, E), atol=2e-5)


def test_future_ids_and_other_rows_change_no_earlier_route_and_padding_none():
    network, ids = shaken(made()), IDS.copy()
    ids[0, 4:] = (ids[0, 4:] + 5) % V
    a, b = (np.asarray(before(network, ids_context(i))[0]).reshape(B, S, E) for i in (IDS, ids))
    np.testing.assert_allclose(a[0, :4], b[0, :4], atol=1e-6)
    np.testing.assert_allclose(a[1], b[1], atol=1e-6)
    assert np.abs(a[0, 4:] - b[0, 4:]).min(-1).max() > 1e-3
    valid = np.tile(np.arange(S) >= 2, (B, 1))
    c, d = (
        np.asarray(before(network, ids_context(np.where(valid, IDS, i), valid=valid))[0]).reshape(B, S, E)
        for i in (0, 9)
    )
    np.testing.assert_allclose(c[:, 2:], d[:, 2:], atol=1e-6)


def test_only_the_current_token_is_read_without_context():
    network = shaken(made(reads="token"))
    ids = np.full((1, S), 3, np.int32)
    ids[0, :-1] = np.arange(S - 1)
    last = [np.asarray(before(network, ids_context(i))[0])[-1] for i in (ids, np.full((1, S), 3, np.int32))]
    np.testing.assert_allclose(*last, atol=1e-6)
    assert network.init_cache(1, S) is None and not any("mixer" in name for name in P.arrays(network))


def test_token_by_token_with_a_cache_equals_at_once_also_behind_padding():
    network = shaken(made())
    valid = np.stack([np.ones(S, bool), np.arange(S) >= 3])
    positions = np.maximum(np.cumsum(valid, 1) - 1, 0)
    whole, _ = before(network, ids_context(valid=valid, positions=positions))
    cache, parts = network.init_cache(B, S + 2), []
    for cut in (slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 7)):
        ctx = ids_context(IDS[:, cut], valid=valid[:, cut], positions=positions[:, cut])
        logits, cache = before(network, ctx, cache)
        parts.append(np.asarray(logits).reshape(B, -1, E))
    np.testing.assert_allclose(np.concatenate(parts, 1)[valid], np.asarray(whole).reshape(B, S, E)[valid], atol=1e-5)
    assert int(cache["at"]) == S


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=LAYERS, router=ROUTER, losses={"route_targets": {}})


@pytest.fixture(scope="module")
def recorded(model):
    """A call of the model: (logits, its Aux with what was routed)."""
    return jitted(model, lambda m, ids: m(ids, record=True)[:2])


def test_routes_are_the_same_in_all_layers_and_no_other_weight_changes_them(model, recorded):
    logits, aux = recorded(IDS)
    terms = per_layer_terms(aux.layers)
    routes = [np.asarray(r) for r in terms["router_experts"]]
    expected = np.asarray(before(model.shared["pre_gate"], ids_context())[0]).argmax(-1)
    assert len(routes) == 3 and len(set(expected)) > 1
    for experts, gates in zip(routes, terms["router_gates"], strict=True):
        np.testing.assert_array_equal(experts[:, 0], expected)
        np.testing.assert_array_equal(gates, 1)
    arrays = enumerate(P.arrays(model).items())
    other = {name: a if name.startswith("shared.") else normal(i, *a.shape) for i, (name, a) in arrays}
    new_logits, new_aux = recorded(IDS, state=nnx.state(P.replace(model, other)))
    for experts in per_layer_terms(new_aux.layers)["router_experts"]:
        np.testing.assert_array_equal(experts[:, 0], expected)
    assert np.abs(np.asarray(logits - new_logits)).max() > 0.1
    assert not [name for name in P.arrays(model) if ".router." in name]


def test_the_network_runs_once_for_all_layers(model, monkeypatch):
    calls, run = [], PreGateNetwork.before_layers
    monkeypatch.setattr(PreGateNetwork, "before_layers", lambda *args: (calls.append(1), run(*args))[1])
    jaxpr = jax.make_jaxpr(lambda ids: model(ids)[0])(IDS)
    assert len(calls) == 1
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    inside = [str(eqn.params["jaxpr"]) for eqn in scans]
    assert len(scans) == 3 and not any(f"f32[{V},{SIZE}]" in text for text in inside)  # the router's table


@pytest.mark.parametrize("gate", ["one", "prob"])
def test_the_task_teaches_the_router_through_a_probability_alone(gate):
    model = tiny_model(layers="1*moe", router={**ROUTER, "gate": gate}, losses={})
    values = P.arrays(model)
    own = {name: a for name, a in values.items() if name.startswith("shared.")}
    loss = lambda own: jnp.sin(P.replace(model, {**values, **own})(IDS, train=True)[0]).mean()
    reached = {name for name, g in jax.jit(jax.grad(loss))(own).items() if float(jnp.abs(g).max()) > 0}
    assert reached == (set(own) if gate == "prob" else set())


def test_loss_of_targets_equals_a_loop():
    T, hard, smoothing = 12, 0.75, 0.5
    logits, scores, valid = normal(1, T, E), 2 * normal(2, T, E), np.arange(T) % 3 > 0
    losses = []
    for z, s in zip(np.asarray(logits, np.float64)[valid], np.asarray(scores, np.float64)[valid]):
        log_p = np.log(naive.softmax(z))
        label = (1 - smoothing) * np.eye(E)[s.argmax()] + smoothing / E
        losses.append(-hard * label @ log_p - (1 - hard) * naive.softmax(s) @ log_p)
    assert float(route_targets(logits, scores, hard, smoothing, valid)) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(route_targets(logits, scores + 7, hard, smoothing, valid)) == pytest.approx(np.mean(losses), rel=1e-5)


def test_targets_come_layer_by_layer_add_up_and_teach_nothing_but_the_router(model, recorded):
    scores = normal(3, 4, B * S, E)  # of all layers; the dense one's are not looked at
    values = P.arrays(model)

    def loss(values, ids, inputs):
        return P.replace(model, values)(ids, inputs=inputs, train=True)[1].total_loss()

    total, gradient = jax.jit(jax.value_and_grad(loss))(values, IDS, {"target_scores": scores})
    logits = before(model.shared["pre_gate"], ids_context())[0]
    each = [float(route_targets(logits, scores[layer], 0.75, 0.5)) for layer in (0, 2, 3)]
    assert float(total) == pytest.approx(sum(each), rel=1e-5)
    reached = {name for name, g in gradient.items() if float(jnp.abs(g).max()) > 1e-7}
    assert reached == {name for name in values if name.startswith("shared.")}
    with pytest.raises(ConfigError, match="route_targets: training needs.*target_scores"):
        jax.eval_shape(lambda ids: model(ids, train=True)[0], IDS)
    assert float(recorded(IDS)[1].total_loss()) == 0  # without training there are none


def test_flops_of_the_network_are_counted_once():
    context = 3.5
    flops_of = lambda router: (
        lambda layers: Decoder(tiny_config(layers=layers, router=router, losses={})).flops_per_token(context)
    )
    flops, plain = flops_of(ROUTER), flops_of({"name": "hash"})
    # q, k, v, o and two matrices of the feed-forward part, scores and mixing; the head
    network = 2 * (2 * 6 * SIZE**2 + 4 * SIZE * context) + 2 * SIZE * E
    assert flops("1*moe") - plain("1*moe") == flops("3*moe") - plain("3*moe") == network


@pytest.mark.parametrize("cls, change, message", [
    (PreGateConfig, dict(size=6), r"router\.size: 6 over num_attention_heads=2"),
    (PreGateConfig, dict(num_layers=0), r"router\.num_layers"),
    (PreGateConfig, dict(attn_normalizer=0.0), r"router\.attn_normalizer"),
    (RouteTargetsConfig, dict(hard=1.5), r"router\.hard: expected a number in \[0, 1\]"),
    (RouteTargetsConfig, dict(coef=-1.0), r"router\.coef"),
])  # fmt: skip
def test_impossible_settings_are_refused(cls, change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(cls(), **change).validate("router")
