"""Selectors of whole sequences: against loops, exact invariants, who sees the future, caches, gradients."""

import functools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from naive import normal, tiny_config, tiny_model

from moe_zoo.core import param as P
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build
from moe_zoo.depth.dr_llm import DrLlmConfig, class_weights, decided, focal, windows
from moe_zoo.depth.sequence import Documents
from moe_zoo.layers.attention import View
from moe_zoo.models import Decoder
from moe_zoo.models.counting import count_parameters, train_flops_per_token
from moe_zoo.sharding import MeshConfig, batch_sharding, make_mesh
from moe_zoo.train.objective import prompts
from moe_zoo.train.step import partition

B, S, D, L = 3, 10, 16, 2
NAMES = ("dr_llm", "first")
IDS = np.random.default_rng(3).integers(0, 32, (B, S)).astype(np.int32)
PROMPT = np.arange(S) < np.array([[4], [6], [3]])


@functools.cache
def decoder(name: str, **settings):
    """A decoder whose selectors differ from sequence to sequence."""
    settings = {"windows": 3} | settings if name == "dr_llm" else {"init_bias": 0.0, "alpha": 0.5} | settings
    made = tiny_model(layers=f"{L}*dense", depth={"name": name, **settings}, losses={})
    size = lambda n: 0.1 if "bias" in n else 5.0
    own = [(n, a.shape) for n, a in sorted(P.arrays(made).items()) if ".selector." in n]
    draw = {n: normal(30 + i, *shape, scale=size(n)) for i, (n, shape) in enumerate(own)}
    return P.replace(made, P.arrays(made) | draw)


@functools.cache
def read(name: str):
    """Logits and how often each token went through each layer [L, B, S]."""
    made = decoder(name)

    def run(ids, prompt, inputs):
        logits, aux, _ = made(ids, prompt=prompt, inputs=inputs, record=True)
        return logits, next(iter(aux.layers.values()))[1].terms["depth_through"]

    return jax.jit(run)


def windows_by_loop(x, most):
    """Means of the windows of one prompt [n, D]."""
    n = len(x)
    W = min(most, n)
    return [x[w * (n // W) : (w + 1) * (n // W)].mean(0) for w in range(W)]


def times_by_loop(w, name, x, most=3):
    """How often a prompt [n, D] goes through, from the formulas."""
    if name == "first":
        return int(np.mean([naive.sigmoid(t @ w["selector.kernel"] + w["selector.bias"]) for t in x]) >= 0.5)
    gelu = lambda a: 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
    inside = [gelu(m @ w["selector.hidden_in"] + w["selector.hidden_bias"]) for m in windows_by_loop(x, most)]
    return int(np.argmax(np.mean([h @ w["selector.classes_out"] + w["selector.classes_bias"] for h in inside], 0)))


def block_by_loop(w, x):
    """The block without a selector, of one document [n, D]."""
    h = np.stack([naive.rms_norm(t, w["mixer_norm.scale"], 1e-6) for t in x])
    mixed = naive.attention(
        h[None], *(w[f"mixer.{n}"] for n in "qkvo"), sees=lambda _, i, j: j <= i, positions=np.arange(len(x))[None],
        theta=1e4,
    )[0]  # fmt: skip
    h = mixed + x
    feed = lambda t: naive.ffn(
        naive.rms_norm(t, w["ffn_norm.scale"], 1e-6), *(w[f"ffn.w_{n}"] for n in ("gate", "up", "down"))
    )
    return h + np.stack([feed(t) for t in h])


@pytest.mark.parametrize("name", NAMES)
def test_output_is_that_of_the_loop_over_packed_documents(name):
    """Rows of two documents and padding, each with a prompt of its own; and FiRST's training form."""
    made = decoder(name)
    block, x = jax.tree.map(lambda a: a[0], made.segments[0].blocks[0]), normal(8, B, S, D)
    w = {n: np.asarray(a, np.float64) for n, a in P.arrays(block).items()}
    cuts, lengths = (4, 6, 3), (2, 3, 1, 4, 3, 5)
    segments, positions = np.zeros((2, B, S), int)
    prompt, expected, times = np.zeros((B, S), bool), np.array(x, np.float64), np.zeros((B, S), int)
    soft = np.array(x, np.float64)
    for b, cut in enumerate(cuts):
        for d, (begin, end) in enumerate(((0, cut), (cut, S - 1))):
            own = np.array(x[b, begin:end], np.float64)
            n = lengths[2 * b + d]
            segments[b, begin:end], positions[b, begin:end], prompt[b, begin : begin + n] = d + 1, range(end - begin), 1
            times[b, begin:end] = times_by_loop(w, name, own[:n])
            once = block_by_loop(w, own)
            for _ in range(times[b, begin]):
                expected[b, begin:end] = block_by_loop(w, expected[b, begin:end])
            rho = naive.sigmoid(own @ w["selector.kernel"] + w["selector.bias"]) if name == "first" else 1
            soft[b, begin:end] += np.reshape(rho, (-1, 1)) * (once - own)
    flat = lambda a: jnp.asarray(a).reshape(-1)
    valid = jnp.asarray(segments > 0)
    view = View(jnp.asarray(positions), jnp.asarray(segments), valid).with_rotary({block.mixer.rotary_key}, jnp.float32)
    ctx = RoutingContext(
        batch=B, seq=S, valid=flat(valid), segment_ids=flat(segments), prompt=flat(prompt), record=True
    )
    call = jax.jit(lambda block, x, view, ctx: block(x, view, ctx)[:2])
    y, aux = call(block, x, view, ctx)
    np.testing.assert_array_equal(aux.terms["depth_through"], np.where(segments > 0, times, 0))
    np.testing.assert_allclose(y, expected, rtol=2e-3, atol=3e-4)
    assert len(set(times[segments > 0])) > 1
    assert aux.stats["depth_share"].value() == pytest.approx(times[segments > 0].mean())
    if name == "first":
        y, aux = call(block, x, view, ctx.replace(train=True))
        np.testing.assert_allclose(y, soft, rtol=2e-3, atol=3e-4)
        rho = naive.sigmoid(np.asarray(x) @ w["selector.kernel"] + w["selector.bias"])[segments > 0]
        assert aux.losses["depth_gates"] == pytest.approx(0.5 * rho.mean(), rel=1e-4)
        assert aux.losses["depth_l2"] == pytest.approx(0.01 * (w["selector.kernel"] ** 2).sum(), rel=1e-4)


def test_windows_are_those_of_the_loop_and_drop_the_tail():
    """Left padding, holes, a prompt shorter than there are windows, and one of none."""
    prompt = np.zeros((4, S), bool)
    prompt[0, 3:], prompt[1, [0, 4, 5]], prompt[2] = True, True, np.arange(S) < 8
    x, documents = np.asarray(normal(5, 4, S, D)), Documents(jnp.zeros((4, S), jnp.int32), jnp.asarray(prompt), True)
    for most, (means, live) in jax.jit(lambda x: {n: windows(x, documents, n) for n in (1, 3, 8)})(x).items():
        for b in range(4):
            expected = windows_by_loop(x[b, prompt[b]], most) if prompt[b].any() else []
            assert int(live[b].sum()) == len(expected) and bool(live[b, : len(expected)].all())
            if expected:
                np.testing.assert_allclose(means[b, : len(expected)], expected, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_once_through_all_layers_is_the_model_as_it_was_to_the_last_bit_and_a_path_is_followed(name):
    made, base = decoder(name), tiny_model(layers=f"{L}*dense", losses={})
    values = P.arrays(made)
    assert {n for n in values if ".selector." not in n} == P.arrays(base).keys()
    base = P.replace(base, {n: values[n] for n in P.arrays(base)})
    path = lambda *rows: {"depth": jnp.asarray(rows, jnp.int32).T}
    logits, times = read(name)(IDS, PROMPT, path((1, 1), (1, 1), (1, 1)))
    np.testing.assert_array_equal(logits, jax.jit(lambda ids: base(ids)[0])(IDS))
    twice = 2 if name == "dr_llm" else 1
    mixed, times = read(name)(IDS, PROMPT, path((1, 1), (0, 1), (1, twice)))
    np.testing.assert_array_equal(times[:, :, 0], [[1, 0, 1], [1, 1, twice]])
    np.testing.assert_allclose(mixed[0], logits[0], atol=1e-6)
    assert np.abs(mixed[1] - logits[1]).max() > 1e-2
    with pytest.raises(ValueError, match="one document per row"):
        jax.eval_shape(lambda: made(IDS, segment_ids=jnp.ones_like(IDS), inputs=path((1, 1), (1, 1), (1, 1))))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_decided_depends_on_the_prompt_alone_and_without_one_on_all(name):
    other = np.random.default_rng(1).integers(0, 32, (20, B, S))
    futures = np.where(np.arange(S) < 6, IDS, other).astype(np.int32)
    everything = np.ones_like(PROMPT)
    logits, times = read(name)(IDS, PROMPT, {})
    moved = [read(name)(ids, PROMPT, {}) for ids in futures[:3]]
    assert all(np.abs(found - logits)[:, :6].max() < 1e-5 for found, _ in moved)
    assert all((now == times).all() for _, now in moved)
    assert (times == times[:, :, :1]).all() and len(np.unique(times)) > 1
    whole, _ = read(name)(IDS, everything, {})
    assert any(np.abs(read(name)(ids, everything, {})[0] - whole)[:, :6].max() > 1e-3 for ids in futures)
    assert decoder(name).causal and decoder(name).reads_prompts and not decoder(name).competes


def test_soft_gates_see_no_future_and_hard_ones_of_the_whole_text_do():
    """FiRST's training form is causal token by token; what is not is to decide by tokens that are still to come."""
    soft = jax.jit(lambda ids: decoder("first")(ids, train=True)[0])
    changed = (IDS + (np.arange(S) == S - 1)) % 32
    np.testing.assert_allclose(soft(changed)[:, :-1], soft(IDS)[:, :-1], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_keeps_what_the_prompt_decided_and_reads_as_the_whole_does(name):
    """Prompts of several lengths, padded on the left; a layer that is skipped leaves no keys, a repeated one two."""
    made = decoder(name)
    whole, times = read(name)(IDS, PROMPT, {})
    n = PROMPT.sum(1)
    S0 = n.max()
    ids, valid = np.zeros((B, S0), np.int32), np.zeros((B, S0), bool)
    for b in range(B):
        ids[b, S0 - n[b] :], valid[b, S0 - n[b] :] = IDS[b, : n[b]], True
    step = jax.jit(lambda ids, positions, valid, cache: made(ids, positions=positions, valid=valid, cache=cache)[::2])
    positions = np.maximum(np.cumsum(valid, 1) - 1, 0).astype(np.int32)
    logits, cache = step(ids, positions, valid, made.init_cache(B, S0 + 6))
    first = jax.tree.map(np.asarray, cache["segments"][0][0]["selector"])
    np.testing.assert_array_equal(first["times"], times[:, :, 0])
    assert first["decided"].all()
    for b in range(B):
        np.testing.assert_allclose(logits[b, S0 - n[b] :], whole[b, : n[b]], atol=5e-5)
    for new in range(4):
        at = n + new
        logits, cache = step(IDS[np.arange(B), at][:, None], at[:, None].astype(np.int32), np.ones((B, 1), bool), cache)
        np.testing.assert_allclose(logits[:, 0], whole[np.arange(B), at], atol=5e-5)
    kept = cache["segments"][0][0]
    np.testing.assert_array_equal(kept["selector"]["times"], first["times"])
    there = lambda key: np.asarray(kept[key]["mixer"]["valid"]).sum(-1)
    np.testing.assert_array_equal(there("block"), np.where(first["times"] > 0, n + 4, 0))
    if name == "dr_llm":
        np.testing.assert_array_equal(there("again"), np.where(first["times"] > 1, n + 4, 0))


def test_a_layer_that_nobody_takes_is_not_computed_and_deciding_is_done_once():
    """Weights that are not numbers go unnoticed where nothing is computed with them."""
    made = decoder("dr_llm")
    broken = lambda part: {n: a * np.nan if part in n else a for n, a in P.arrays(made).items()}
    skip, text = {"depth": jnp.zeros((L, 1), jnp.int32)}, IDS[:1, :1]
    run = jax.jit(lambda values, cache, inputs: P.replace(made, values)(text, cache=cache, inputs=inputs)[::2])
    logits, cache = run(broken(".ffn."), made.init_cache(1, 4), skip)
    assert jnp.isfinite(logits).all()
    go_on = jax.jit(lambda values, cache: P.replace(made, values)(text, cache=cache)[0])
    assert jnp.isfinite(go_on(broken(".ffn."), cache)).all() and jnp.isfinite(go_on(broken(".selector."), cache)).all()


def test_losses_teach_selectors_alone():
    """Dr.LLM's labels reach no weight of the base; FiRST's gates feel the task."""
    labels = jnp.asarray([[1, 2, 0], [0, 1, 1]], jnp.int32)

    def taught(values):
        aux = P.replace(decoder("dr_llm"), values)(IDS, prompt=PROMPT, inputs={"depth": labels}, train=True)[1]
        return aux.losses["depth_labels"]

    found = jax.jit(jax.grad(taught))(P.arrays(decoder("dr_llm")))
    for name, gradient in found.items():
        assert (float(jnp.abs(gradient).max()) > 0) == (".selector." in name), name
    task = lambda values: jnp.sin(P.replace(decoder("first"), values)(IDS, train=True)[0]).sum()
    found = jax.jit(jax.grad(task))(P.arrays(decoder("first")))
    assert all((np.abs(a) > 0).all() for n, a in found.items() if n.endswith("kernel"))
    for name in NAMES:
        own = {n for n in P.arrays(decoder(name)) if ".selector." in n}
        assert set(partition(decoder(name), ()).trainable) == own
        parameters = count_parameters(decoder(name))
        assert parameters["trainable"] == sum(P.arrays(decoder(name))[n].size for n in own)
        assert train_flops_per_token(decoder(name), S) == 2 * decoder(name).flops_per_token((S + 1) / 2)


def test_focal_loss_and_weights_are_the_papers():
    counts = (4399, 120956, 1457)
    np.testing.assert_allclose(class_weights(DrLlmConfig(class_counts=counts)), [0.916, 0.905, 1.179], atol=1e-3)
    logits, labels = normal(0, 6, 3), jnp.array([0, 1, 2, 0, 2, 1])
    p = np.array([naive.softmax(z)[y] for z, y in zip(np.asarray(logits, np.float64), np.asarray(labels))])
    alpha = class_weights(DrLlmConfig(class_counts=(10, 1000, 0), beta=0.99999))
    np.testing.assert_allclose(alpha / alpha[0], [1, 0.01, 10], rtol=1e-2)

    def losses(logits):
        slope = jax.grad(lambda z: focal(z, labels, alpha, 0.5))(100 * jax.nn.one_hot(labels, 3))
        return focal(logits, labels, alpha, 2.0), focal(logits, labels, np.ones(3), 0.0), slope

    weighted, plain, slope = jax.jit(losses)(logits)
    expected = np.mean(-alpha[np.asarray(labels)] * (1 - p) ** 2 * np.log(p))
    np.testing.assert_allclose([weighted, plain], [expected, -np.log(p).mean()], rtol=1e-5)
    assert np.isfinite(slope).all()


def test_the_budget_goes_from_nothing_over_the_classifier_to_everything_twice():
    logits = normal(1, 200, 3, scale=2.0)
    alone = np.asarray(logits.argmax(-1))
    at = {p: np.asarray(decided(logits, p)) for p in (-1.0, -0.6, -0.5, 0.0, 0.5, 0.75, 1.0)}
    for p, expected in ((-1.0, 0), (-0.5, alone), (0.5, 1), (1.0, 2)):
        np.testing.assert_array_equal(at[p], np.broadcast_to(expected, 200))
    np.testing.assert_array_equal(decided(logits, None), alone)
    means = [at[p].mean() for p in (-1.0, -0.6, -0.5)]
    assert means == sorted(means) and len(set(means)) == 3 and 0 < (at[0.0] == 1).mean() - (alone == 1).mean() < 1


def test_the_prompt_of_a_packed_document_ends_where_its_answer_is_asked_for():
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    asked = np.array([[0, 0, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1]], bool)
    expected = [[1, 1, 1, 0, 1, 1, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(prompts({"segment_ids": jnp.asarray(segments), "loss_mask": asked}), expected)
    weights = {"segment_ids": jnp.asarray(segments), "loss_weights": asked / asked.sum()}
    np.testing.assert_array_equal(prompts(weights), expected)


def test_a_mesh_changes_nothing():
    name, mesh = "dr_llm", make_mesh(MeshConfig(data=4, tensor=2))
    config, values = decoder(name).config, P.arrays(decoder(name))
    ids = np.random.default_rng(0).integers(0, 32, (8, S)).astype(np.int32)
    run = jax.jit(lambda values, ids, mesh: P.replace(Decoder(config, mesh), values)(ids)[0], static_argnums=2)
    np.testing.assert_allclose(
        run(values, jax.device_put(ids, batch_sharding(mesh)), mesh), run(values, ids, None), atol=2e-5
    )


def test_what_cannot_be_is_refused_by_name():
    for settings, words in (
        ({"budget": 1.5}, "depth.budget: expected a number in"),
        ({"beta": 1.0}, "depth.beta"),
        ({"class_counts": [1, 2]}, "class_counts: expected how often labels say skip, execute, repeat"),
        ({"windows": 0}, "windows"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(type(decoder("dr_llm").config), {"depth": {"name": "dr_llm", **settings}}, "model")
    with pytest.raises(ConfigError, match="alpha"):
        tiny_config(depth={"name": "first", "alpha": -1.0})
