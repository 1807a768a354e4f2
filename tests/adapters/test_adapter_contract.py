"""What every adapter must keep: one tiny model, the same questions for all. A new entry is a line in CASES."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive_adapters import CASES, GIVEN, PATTERNS, assembled, expert, mix

from moe_zoo.adapters import ADAPTERS
from moe_zoo.adapters.routed import Routed
from moe_zoo.core import param as P
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.schema import build, build_choice, overlay, to_dict
from moe_zoo.models import Decoder, ModelConfig
from moe_zoo.sharding import MeshConfig, make_mesh, sharding_of
from moe_zoo.train.objective import cross_entropy
from moe_zoo.train.step import partition

B, S, V, D = 2, 8, 24, 12
BASE = build(
    ModelConfig,
    {
        "vocab_size": V, "hidden_size": D, "layers": "2*dense", "intermediate_size": 20,
        "attention": {"num_attention_heads": 2, "num_key_value_heads": 1},
    },
    "model",
)  # fmt: skip
IDS = np.random.default_rng(0).integers(0, V, (B, S)).astype(np.int32)
TASKS = np.repeat(np.array([[0], [1]], np.int32), S, axis=1)


@functools.cache
def base() -> Decoder:
    return P.materialize(Decoder(BASE), 0)


@functools.cache
def adapted(name: str) -> Decoder:
    """Fresh adapters beside the base's weights."""
    settings = overlay(to_dict(BASE), {"adapters": {**PATTERNS, **CASES[name].settings}})
    return P.materialize(Decoder(build(ModelConfig, settings, "model")), 1, given=P.arrays(base()))


@functools.cache
def trained(name: str) -> dict[str, np.ndarray]:
    """Values for all that adapters have, so that every part matters; scales and whole numbers as they are."""
    rng, values = np.random.default_rng(3), {}
    for path, var in P.flat(adapted(name)).items():
        value = np.asarray(var.get_value())
        if "adapters." in path and not path.endswith(".scale") and value.dtype == np.float32:
            value = 0.4 * rng.standard_normal(value.shape).astype(np.float32)
        values[path] = value
    return values


@functools.cache
def program(name: str):
    """(trainable, rest, ids, valid, task) -> ((loss, (logits, Aux)), gradients): compiled once, shared by the tests."""
    model = adapted(name)

    def loss(trainable, fixed, ids, valid, task):
        logits, aux, _ = P.replace(model, trainable | fixed)(ids, valid=valid, domain=task, num_domains=2, train=True)
        return cross_entropy(logits, jnp.roll(ids, -1, 1)).mean() + aux.total_loss(), (logits, aux)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def run(name, values, ids=IDS, valid=None):
    names = partition(adapted(name)).trainable
    fixed = {n: v for n, v in values.items() if n not in names}
    valid = np.ones(ids.shape, bool) if valid is None else valid
    (loss, (logits, aux)), gradients = program(name)({n: values[n] for n in names}, fixed, ids, valid, TASKS)
    return np.asarray(logits), aux, jax.tree.map(np.asarray, gradients)


def layers_of(name):
    """(adapter of one layer, its arrays in float64, weight [D, N], per-layer name) of every adapted layer. Arrays that
    it has from a pool of all layers are among them.
    """
    model = P.replace(adapted(name), {n: jnp.asarray(v) for n, v in trained(name).items()})
    pools = getattr(getattr(model, "adapters", None), "pools", {})
    for path, block, ids in model.blocks():
        for linear, adapter in block.adapters.items():
            w = np.asarray(P.arrays(model)[f"{path}.{linear}"], np.float64)
            for row, layer in enumerate(ids):
                one = jax.tree.map(lambda x, row=row: x[row], adapter)
                arrays = {n: np.asarray(a, np.float64) for n, a in P.arrays(one).items()}
                if linear in pools:
                    pool = {n: np.asarray(a, np.float64) for n, a in P.arrays(pools[linear]).items()}
                    arrays |= assembled(pool, layer, adapter.config.shards_per_vector)
                yield one, arrays, w[row].reshape(adapter.linear.in_features, -1), f"layers.{layer}.{linear}"


call = jax.jit(lambda adapter, x, y, w, ctx: adapter(x, y, w, ctx))


def test_every_entry_is_tried():
    assert {case.settings["name"] for case in CASES.values()} | {"none"} == set(ADAPTERS.names())


@pytest.mark.parametrize("name", CASES)
def test_every_token_by_the_papers_formula(name):
    case = CASES[name]
    domain = np.array([0, 1, 1, 0, 1], np.int32)
    shared = np.float32(GIVEN[domain])[None, None] if case.shared is None else np.float32(case.shared)
    given = {"adapters": shared}
    ctx = RoutingContext(batch=1, seq=5, domain=domain, num_domains=2, train=True, shared=given)
    seen = set()
    for adapter, p, w, where in layers_of(name):
        if where.rpartition(".")[2] in ("k", "v"):
            continue  # shaped as each other and treated as q
        if ".ffn." in where and case.own_feed_forward:
            continue
        x = np.random.default_rng(1).standard_normal((5, w.shape[0]))
        y = x @ w
        config = adapter.config
        pooled = (
            {} if hasattr(adapter, "a") else {adapter.linear.name: (jnp.float32(p["a"][0]), jnp.float32(p["b"][0]))}
        )
        told = ctx.replace(inputs={"adapters": pooled})
        got, aux = call(adapter, jnp.float32(x), jnp.float32(y), jnp.float32(w), told)
        if name == "dora":
            updated = w + np.outer(p["scale"][0, 0], 1) * p["a"][0].T @ p["b"][0]
            m = np.linalg.norm(w, axis=0) + p["magnitude"]
            expected = m * (x @ updated) / np.linalg.norm(updated, axis=0)
        elif case.adds is not None:
            tasks = np.asarray(ctx.domain).tolist()
            expected = np.stack([y[t] + case.adds(x[t], p, config, tasks[t]) for t in range(5)])
        elif case.gates is None:
            expected = np.stack([y[t] + expert(x[t], p, 0) for t in range(5)])
        else:
            gates = np.stack([case.gates(x[t], p, config, int(ctx.domain[t])) for t in range(5)])
            of_base = gates.sum(1, keepdims=True) if case.gates_base else 1
            expected = of_base * y + np.stack([mix(gates[t], x[t], p) for t in range(5)])
            np.testing.assert_allclose(aux.stats["load"].total, gates.sum(0), atol=1e-5)
            by_task = np.stack([gates[np.asarray(ctx.domain) == i].sum(0) for i in range(2)])
            np.testing.assert_allclose(aux.stats["load_by_domain"].total, by_task, atol=1e-5)
        np.testing.assert_allclose(got, expected, atol=2e-5, err_msg=where)
        seen.add(where)
        assert config.targets(where) == (not np.array_equal(expected, y)), where
    assert len(seen) == (4 if case.own_feed_forward else 8)


def frozen_experts(name: str) -> bool:
    return getattr(adapted(name).config.adapters.config, "freeze_experts", False)


@pytest.mark.parametrize("name", CASES)
def test_fresh_adapters_leave_the_model_as_it_was(name):
    values = {n: np.asarray(a) for n, a in P.arrays(adapted(name)).items()}
    logits = jax.jit(lambda model, ids: model(ids)[0])(base(), IDS)
    got, _, gradients = run(name, values)
    np.testing.assert_allclose(got, logits, atol=1e-5 if name == "dora" else 1e-6)
    if not frozen_experts(name):  # of experts that are frozen at nothing there is nothing to learn
        assert any(np.abs(g).max() > 0 for n, g in gradients.items() if n.endswith((".b", ".shards_b")))


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_what_is_live_and_nothing_else(name):
    values = trained(name)
    _, _, gradients = run(name, values)
    assert gradients and all("adapters." in n for n in gradients)
    assert frozen_experts(name) == (not any(n.endswith((".a", ".b", ".shards_a", ".shards_b")) for n in gradients))
    for path, gradient in gradients.items():
        assert np.isfinite(gradient).all(), path
        if ".shards_" in path:
            index = values[path.rpartition(".")[0] + ".index"][0 if path.endswith("a") else -1]
            used = np.isin(np.arange(len(gradient)), index)
            np.testing.assert_array_equal(np.abs(gradient).max(-1) > 0, used, err_msg=path)
            continue
        if not path.endswith((".a", ".b")):
            # tasks decide, no router does
            assert np.abs(gradient).max() > 0 or CASES[name].settings.get("routing") == "task", path
            continue
        live = values[path.rpartition(".")[0] + ".scale"] != 0
        if path.endswith(".a") and gradient.shape[1] != live.shape[1]:
            live = live.any(1, keepdims=True)
        moved = np.abs(gradient).max(-1) > 0
        assert not (moved & ~live).any(), path
        # of an expert that no token chose nothing moves
        assert moved.sum() > live.sum() / 2 or not live.any(), path


@pytest.mark.parametrize("name", CASES)
def test_later_tokens_and_padding_change_nothing_before(name):
    values = trained(name)
    logits, aux, _ = run(name, values)
    later = IDS.copy()
    later[:, 5:] = (later[:, 5:] + 7) % V
    changed, _, _ = run(name, values, later)
    np.testing.assert_allclose(changed[:, :5], logits[:, :5], atol=1e-5)
    assert np.abs(changed[:, 5:] - logits[:, 5:]).max() > 1e-3
    valid = np.ones((B, S), bool)
    valid[:, 6:] = False
    one, first, _ = run(name, values, IDS, valid)
    two, second, _ = run(name, values, np.where(valid, IDS, 3), valid)
    np.testing.assert_allclose(one[:, :6], two[:, :6], atol=1e-5)
    for loss in first.losses:
        np.testing.assert_allclose(first.losses[loss], second.losses[loss], rtol=1e-5)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.gates])
def test_a_gate_of_one_expert_is_that_expert_merged(name):
    for adapter, _, w, where in list(layers_of(name))[:2]:
        E, x = adapter.num_experts, jnp.asarray(np.random.default_rng(2).standard_normal((3, w.shape[0])), jnp.float32)
        one = jnp.eye(E)[E - 1]
        merged = adapter.merged(jnp.float32(w), one)
        alone = x @ jnp.float32(w) + adapter.out(adapter.hidden(x), jnp.broadcast_to(one, (3, E)))
        np.testing.assert_allclose(x @ merged, alone, atol=2e-5, err_msg=where)
        np.testing.assert_allclose(adapter.unmerged(merged, one), w, atol=1e-6)
        assert np.abs(np.asarray(merged) - w).max() > 1e-2 or not adapter.live()[E - 1]


@pytest.mark.parametrize("name", CASES)
def test_every_variable_has_its_place_on_a_mesh(name):
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    for path, var in P.flat(Decoder(adapted(name).config)).items():
        spec = sharding_of(mesh, var.logical_axes, var.get_value().shape, path).spec
        if path.endswith(("mixer.q.a", "mixer.o.b")):
            assert spec[-1] == "fsdp", path


@pytest.mark.parametrize("name", CASES)
def test_settings_survive_the_way_to_json_and_back(name):
    config = adapted(name).config
    assert build(ModelConfig, to_dict(config), "model") == config
    choice = build_choice(ADAPTERS, CASES[name].settings, "adapters")
    assert dataclasses.is_dataclass(choice.config) and isinstance(hash(config), int)
    assert (CASES[name].gates is not None) == issubclass(choice.cls, Routed)
