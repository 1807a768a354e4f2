"""route_top_k and expert_positions against a loop over tokens, in values and gradients."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import expert_positions, expert_rows, route_top_k
from pallas_kernels.route_top_k import pallas_tpu, scoring, xla

FAST = ["reference", "xla"]


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def naive(logits, k, score_function="softmax", bias=None, renormalize=False, scale=1.0, valid=None, priority="token"):
    """(experts, gates, counts, positions, scores) by loops in float64."""
    logits = np.asarray(logits, np.float64)
    T, E = logits.shape
    exp = np.exp(logits - logits.max(1, keepdims=True))
    scores = exp / exp.sum(1, keepdims=True) if score_function == "softmax" else 1 / (1 + np.exp(-logits))
    experts, gates = np.full((T, k), E), np.zeros((T, k))
    for t in range(T):
        if valid is not None and not valid[t]:
            continue
        key = scores[t] + (0 if bias is None else bias)
        experts[t] = sorted(range(E), key=lambda e: (-key[e], e))[:k]
        gates[t] = scores[t, experts[t]]
        if renormalize:
            gates[t] /= gates[t].sum()
    counts, positions = naive_positions(experts, E, priority)
    return experts, gates * scale, counts, positions, scores


def naive_positions(experts, E, priority):
    T, K = experts.shape
    counts, positions = np.zeros(E + 1, int), np.zeros((T, K), int)
    order = [(t, k) for k in range(K) for t in range(T)] if priority == "choice" else np.ndindex(T, K)
    for t, k in order:
        if experts[t, k] < E:
            positions[t, k] = counts[experts[t, k]]
            counts[experts[t, k]] += 1
    return counts[:E], positions


def check_routes(got, expected, rtol=1e-5):
    for name, a, b in zip(got._fields, got, expected, strict=True):
        if a is None or b is None:
            assert name == "scores" and a is None
        elif name in ("gates", "scores"):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7, err_msg=name)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


@functools.cache
def tpu_mesh(topology, devices=1):
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return Mesh(np.array(topology.devices[:devices]), ("data",))


def compiled(mesh, function, *args, spec=P()):
    sharding = NamedSharding(mesh, spec)
    jitted = jax.jit(function, in_shardings=jax.tree.map(lambda _: sharding, args))
    # the cache could not load it again: there is no such device
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        return jitted.lower(*args).compile().as_text()


# (T, E, k): E beside a lane and a sublane tile, k = 1, k = E, one token, one expert, T beside a block
SHAPES = [(37, 8, 2), (130, 60, 8), (1, 8, 3), (50, 5, 5), (129, 130, 1), (9, 1, 1)]
SETTINGS = {
    "softmax": {},
    "renormalised": {"renormalize": True, "scale": 2.5},
    "sigmoid": {"score_function": "sigmoid", "renormalize": True},
    "by choice": {"priority": "choice"},
}


def case(shape, settings, with_bias, with_valid):
    T, E, k = shape
    # seeded by the shape; logits far enough apart for float32 to order as float64 does
    rng = np.random.default_rng(T * E + k)
    logits = (rng.permuted(np.tile(np.arange(E), (T, 1)), axis=1) * (6 / E) - 3).astype(np.float32)
    bias = rng.normal(size=E).astype(np.float32) if with_bias else None
    valid = rng.random(T) < 0.7 if with_valid else None
    ours = {**settings, "selection_bias_E": bias, "valid_T": valid, "return_scores": True}
    return logits, ours, naive(logits, k, bias=bias, valid=valid, **settings)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("extras", [(False, False), (True, True)], ids=["plain", "bias and invalid"])
def test_equals_naive_loop(implementation, shape, name, extras):
    logits, settings, expected = case(shape, SETTINGS[name], *extras)
    check_routes(route_top_k(logits, shape[2], implementation=implementation, **settings), expected)


# The interpreter takes about a second a case.
INTERPRETED = [
    ((37, 8, 2), "renormalised", (False, True)),
    ((300, 60, 8), "sigmoid", (True, False)),
    ((300, 12, 3), "by choice", (True, True)),
    ((50, 5, 5), "softmax", (False, False)),
    ((140, 130, 9), "by choice", (False, True)),
    ((1, 8, 1), "softmax", (False, False)),
]


@pytest.mark.parametrize(("shape", "name", "extras"), INTERPRETED, ids=str)
def test_kernel_interpreted(shape, name, extras):
    logits, settings, expected = case(shape, SETTINGS[name], *extras)
    check_routes(route_top_k(logits, shape[2], implementation="pallas_tpu", **settings), expected)


def test_kernel_carries_across_blocks():
    """Several blocks of several strips, the last one partial."""
    T, E = 4 * 512 + 700, 4
    logits = draw(1, T, E)
    for priority in ("token", "choice"):
        got = route_top_k(logits, 2, priority=priority, implementation="pallas_tpu")
        expected = route_top_k(logits, 2, priority=priority, implementation="reference")
        check_routes(got, expected)


@pytest.mark.parametrize(
    ("shape", "name", "extras"),
    [((200, 60, 8), "renormalised", (True, True)), ((37, 8, 2), "by choice", (False, False))],
    ids=str,
)
def test_gpu_kernel_interpreted(shape, name, extras):
    """The first in four blocks, of which the last is partial."""
    logits, settings, expected = case(shape, SETTINGS[name], *extras)
    check_routes(route_top_k(logits, shape[2], implementation="pallas_gpu", **settings), expected)


ALL = [*FAST, "pallas_tpu"]


@pytest.mark.parametrize("implementation", ALL)
def test_ties_go_to_the_lower_id(implementation):
    logits = np.zeros((3, 9), np.float32)
    logits[1, 4] = logits[1, 7] = 1
    routes = route_top_k(logits, 3, implementation=implementation)
    np.testing.assert_array_equal(routes.experts, [[0, 1, 2], [4, 7, 0], [0, 1, 2]])
    np.testing.assert_array_equal(routes.counts, [3, 2, 2, 0, 1, 0, 0, 1, 0])


@pytest.mark.parametrize(
    ("implementation", "score_function"),
    [*((name, f) for name in ALL for f in ("softmax", "sigmoid")), ("pallas_gpu", "sigmoid")],
)
def test_hostile_logits_choose_no_expert_twice(implementation, score_function):
    logits = draw(1, 12, 6)
    logits[0] = np.nan
    logits[1, 2] = np.nan
    logits[2] = -np.inf
    logits[3] = np.inf
    logits[4, :4] = -np.inf
    logits[5, 5] = np.inf
    bias = np.array([0, -np.inf, 0, 0, np.nan, 0], np.float32)
    for selection_bias in (None, bias):
        kwargs = {"score_function": score_function, "selection_bias_E": selection_bias}
        routes = route_top_k(logits, 5, implementation=implementation, **kwargs)
        assert all(len(set(row)) == 5 for row in np.asarray(routes.experts).tolist())
        assert routes.experts.min() >= 0 and routes.experts.max() < 6 and routes.counts.sum() == 60
        assert np.isfinite(routes.gates[6:]).all()
        if score_function == "sigmoid" and selection_bias is None:  # the NaN expert comes last, and shows if chosen
            assert 2 not in routes.experts[1] and np.isfinite(routes.gates[1]).all()
            last = route_top_k(logits, 6, implementation=implementation, **kwargs)
            assert last.experts[1, 5] == 2 and np.isnan(last.gates[1, 5])


@pytest.mark.parametrize("implementation", [*ALL, None])
def test_gradients(implementation):
    """Through gates and scores; none through selection, to the bias, or from tokens that are not valid."""
    T, E, k = 11, 7, 3
    logits, bias = draw(1, T, E), 0.1 * draw(2, E)
    d_gates, d_scores, valid = draw(3, T, k), draw(4, T, E), np.arange(T) != 4
    settings = {"renormalize": True, "scale": 1.5, "return_scores": True, "valid_T": valid}
    expert_TK = route_top_k(logits, k, selection_bias_E=bias, implementation="reference", **settings).experts

    def loss(logits, bias):
        r = route_top_k(logits, k, selection_bias_E=bias, implementation=implementation, **settings)
        return jnp.sum(r.gates * d_gates) + jnp.sum(r.scores * d_scores)

    def plain(logits):
        scores = jax.nn.softmax(logits)
        picked = jnp.take_along_axis(scores, np.minimum(expert_TK, E - 1), axis=1)
        gates = 1.5 * picked / picked.sum(1, keepdims=True)
        return jnp.sum(jnp.where(valid[:, None], gates, 0) * d_gates) + jnp.sum(scores * d_scores)

    got, d_bias = jax.grad(loss, (0, 1))(logits, bias)
    np.testing.assert_allclose(got, jax.grad(plain)(logits), atol=1e-6)
    assert not np.any(d_bias)


def test_no_scatter_in_the_derivative():
    loss = lambda logits: jnp.sum(route_top_k(logits, 2, renormalize=True).gates ** 2)
    text = jax.jit(jax.grad(loss)).lower(draw(1, 16, 8)).as_text()
    assert "scatter" not in text and text.count("sort") == 0


@pytest.mark.parametrize("implementation", ALL)
def test_bfloat16_logits_score_in_float32(implementation):
    logits = jnp.asarray(draw(1, 20, 16), jnp.bfloat16)
    routes = route_top_k(logits, 4, return_scores=True, implementation=implementation)
    assert routes.gates.dtype == routes.scores.dtype == jnp.float32
    wide = route_top_k(logits.astype(jnp.float32), 4, return_scores=True, implementation="reference")
    check_routes(routes, wide)
    grad = jax.grad(lambda x: route_top_k(x, 4, implementation=implementation).gates[:, 0].sum())(logits)
    assert grad.dtype == jnp.bfloat16 and np.isfinite(grad.astype(np.float32)).all()


def test_float64():
    with jax.enable_x64(True):
        logits = np.random.default_rng(0).normal(size=(9, 7))
        routes = route_top_k(logits, 3, renormalize=True, return_scores=True)
        check_routes(routes, naive(logits, 3, renormalize=True), rtol=1e-12)
        assert routes.gates.dtype == np.float64 and routes.experts.dtype == routes.positions.dtype == np.int32
        with pytest.raises(NotImplementedError, match="it computes in float32"):
            route_top_k(logits, 3, implementation="pallas_tpu")


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("priority", ["token", "choice"])
@pytest.mark.parametrize(("T", "K", "E"), [(40, 3, 4), (1, 1, 1), (65, 1, 300), (0, 2, 3), (33, 2, 8)])
def test_positions_of_given_ids(implementation, priority, T, K, E):
    """Ids of no expert, and a token that names one expert more than once."""
    experts = np.random.default_rng(T).integers(0, E + 1, (T, K)).astype(np.int32)
    counts, positions = expert_positions(experts, E, priority=priority, implementation=implementation)
    expected = naive_positions(experts, E, priority)
    np.testing.assert_array_equal(counts, expected[0])
    np.testing.assert_array_equal(positions, expected[1])
    assert counts.dtype == positions.dtype == np.int32


@pytest.mark.parametrize("implementation", [*FAST, "pallas_tpu", "pallas_gpu"])
@pytest.mark.parametrize(("T", "K", "E"), [(40, 3, 4), (1, 1, 1), (65, 1, 300), (700, 9, 11), (0, 2, 3)])
def test_rows_are_a_stable_sort(implementation, T, K, E):
    if implementation not in FAST and T == 0:
        with pytest.raises(NotImplementedError, match="there is no choice"):
            expert_rows(np.zeros((0, K), np.int32), E, implementation=implementation)
        return
    experts = np.random.default_rng(T).integers(0, E + 1, (T, K)).astype(np.int32)
    counts, rows = expert_rows(experts, E, implementation=implementation)
    order = np.argsort(experts.reshape(-1), kind="stable")
    expected = np.empty(T * K, int)
    expected[order] = np.arange(T * K)
    np.testing.assert_array_equal(rows, np.where(experts < E, expected.reshape(T, K), T * K))
    np.testing.assert_array_equal(counts, np.bincount(experts.reshape(-1), minlength=E + 1)[:E])


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize(("T", "K", "E"), [(300, 3, 4), (1, 1, 1), (65, 1, 300)])
def test_the_way_of_tpus_ranks_alike(T, K, E, start):
    """Run on a CPU; for real experts only."""
    experts = jnp.asarray(np.random.default_rng(T).integers(0, E + 1, (T, K)), jnp.int32)
    counts, ranks = xla._by_matmul(experts, E=E, start=start)
    expected_counts, expected_ranks = xla._by_pairs(experts, E=E, start=start)
    np.testing.assert_array_equal(counts, expected_counts)
    np.testing.assert_array_equal(np.where(experts < E, ranks, 0), np.where(experts < E, expected_ranks, 0))


def test_positions_make_the_same_rows():
    routes = route_top_k(draw(1, 100, 8), 3, valid_T=np.arange(100) % 5 != 0)
    counts, rows = expert_rows(routes.experts, 8)
    starts = np.append(np.cumsum(counts) - counts, 300)
    np.testing.assert_array_equal(starts[routes.experts] + routes.positions, rows)


def test_the_tpu_looks_nothing_up():
    """No gather, sort or scatter on a TPU, where they are slow, also without the kernel."""
    ids = jax.ShapeDtypeStruct((64, 2), jnp.int32)
    text = compiled(tpu_mesh("v5e:2x2"), lambda ids: expert_rows(ids, 16), ids)
    assert not any(f" {op}(" in text for op in ("gather", "sort", "scatter"))


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu", None])
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(implementation, check_vma):
    """Tokens sharded over 8 devices, bias replicated; positions count within each shard."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    logits, bias = draw(1, 8, 10, 6), 0.1 * draw(2, 6)

    def local(logits, bias):
        routes = route_top_k(logits[0], 2, selection_bias_E=bias, implementation=implementation)
        return jax.tree.map(lambda a: a[None], routes)

    specs = {"in_specs": (P("data"), P()), "out_specs": P("data"), "check_vma": check_vma}
    sharded = jax.jit(jax.shard_map(local, mesh=mesh, **specs))
    got, pullback = jax.vjp(lambda x: sharded(x, bias).gates, logits)
    routes = sharded(logits, bias)
    for i, row in enumerate(logits):
        expected = route_top_k(row, 2, selection_bias_E=bias, implementation="xla")
        check_routes(type(routes)(*(None if a is None else a[i] for a in routes)), expected)
    plain = jax.vmap(lambda row: route_top_k(row, 2, selection_bias_E=bias, implementation="xla").gates)
    d_gates = draw(3, *got.shape)
    np.testing.assert_allclose(pullback(d_gates)[0], jax.vjp(plain, logits)[1](d_gates)[0], atol=1e-6)


# --- ahead of time, for a TPU ---------------------------------------------------------------------------------------


AOT = [
    ((37, 5, 5), jnp.float32, {"priority": "choice"}, True),
    ((600, 60, 4), jnp.bfloat16, {"score_function": "sigmoid", "renormalize": True, "return_scores": True}, True),
    ((256, 129, 20), jnp.float32, {"priority": "choice"}, False),
    ((1, 8, 1), jnp.float32, {}, False),
    ((1024, 64, 8), jnp.float32, {}, False),
]


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize(("shape", "dtype", "settings", "extras"), AOT, ids=str)
def test_compiles_for_tpu(topology, shape, dtype, settings, extras):
    T, E, k = shape
    bias = jax.ShapeDtypeStruct((E,), jnp.float32) if extras else None
    valid = jax.ShapeDtypeStruct((T,), jnp.bool_) if extras else None
    route = lambda logits, bias, valid: route_top_k(
        logits, k, selection_bias_E=bias, valid_T=valid, implementation="pallas_tpu", **settings
    )
    assert "tpu_custom_call" in compiled(tpu_mesh(topology), route, jax.ShapeDtypeStruct((T, E), dtype), bias, valid)


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize(("T", "K", "E"), [(1024, 8, 64), (37, 1, 5), (300, 9, 130)])
def test_rows_compile_for_tpu(topology, T, K, E):
    route = lambda ids: expert_rows(ids, E, implementation="pallas_tpu")
    text = compiled(tpu_mesh(topology), route, jax.ShapeDtypeStruct((T, K), jnp.int32))
    assert "tpu_custom_call" in text and " sort(" not in text


def test_the_kernel_stands_alone():
    """One launch between the router's matmul and whatever comes next: no copy, no sort, no scatter."""
    arrays = jax.ShapeDtypeStruct((1024, 256), jnp.bfloat16), jax.ShapeDtypeStruct((256, 64), jnp.bfloat16)

    def route(x, w):
        routes = route_top_k((x @ w).astype(jnp.float32), 8, implementation="pallas_tpu")
        return routes.experts.T, routes.gates.T, routes.positions.T, routes.counts

    text = compiled(tpu_mesh("v5e:2x2"), route, *arrays)
    entry = text[text.index("\nENTRY") :]
    assert entry.count("tpu_custom_call") == 1
    assert not any(f" {op}(" in entry for op in ("copy", "transpose", "sort", "scatter", "reduce"))


@pytest.mark.parametrize("check_vma", [True, False])
def test_none_chooses_the_kernel_where_nothing_is_partitioned(check_vma):
    """XLA cannot partition a kernel: outside shard_map, on a mesh of several devices, it would refuse to compile."""
    mesh, logits = tpu_mesh("v5e:2x2", devices=2), draw(1, 256, 8)
    route = lambda logits: route_top_k(logits, 2)
    local = jax.shard_map(route, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma)
    assert "tpu_custom_call" in compiled(mesh, local, logits, spec=P("data"))
    assert "tpu_custom_call" not in compiled(mesh, route, logits, spec=P("data"))
    rows = lambda ids: expert_rows(ids, 8)
    ids = jnp.zeros((256, 2), jnp.int32)
    local = jax.shard_map(rows, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma)
    assert "tpu_custom_call" in compiled(mesh, local, ids, spec=P("data"))
    assert "tpu_custom_call" not in compiled(mesh, rows, ids, spec=P("data"))


# --- errors ----------------------------------------------------------------------------------------------------------


def test_errors_name_what_was_given():
    logits = draw(1, 4, 6)
    with pytest.raises(
        ValueError, match=r"k must lie in \[1, E\] = \[1, 6\], got 7. Given: logits float32\[4, 6\], k 7"
    ):
        route_top_k(logits, 7)
    with pytest.raises(ValueError, match=r"score_function must be one of softmax, sigmoid, got 'relu'"):
        route_top_k(logits, 2, score_function="relu")
    with pytest.raises(ValueError, match=r"priority must be one of token, choice"):
        expert_positions(np.zeros((3, 1), np.int32), 2, priority="expert")
    with pytest.raises(ValueError, match=r"selection_bias must have shape \[6\], got \[5\]"):
        route_top_k(logits, 2, selection_bias_E=np.zeros(5, np.float32))
    with pytest.raises(TypeError, match="valid must be a bool array, got int32"):
        route_top_k(logits, 2, valid_T=np.ones(4, np.int32))
    with pytest.raises(TypeError, match="experts must be an integer array"):
        expert_positions(logits, 6)
    with pytest.raises(ValueError, match="unknown implementation 'xlaa': did you mean 'xla'"):
        route_top_k(logits, 2, implementation="xlaa")
    with pytest.raises(NotImplementedError, match="at most 1024 experts"):
        route_top_k(draw(1, 2, 1025), 2, implementation="pallas_tpu")


def test_refusals_have_reasons():
    settings = scoring.Settings(2, "softmax", False, 1.0, "choice", False)
    assert pallas_tpu.refusal((1 << 16, 64), jnp.float32, settings) is None
    assert "VMEM" in pallas_tpu.refusal((1 << 20, 64), jnp.float32, settings)
    assert "no token" in pallas_tpu.refusal((0, 64), jnp.float32, settings)
