"""What holds for one entry alone: exact invariants of its paper, and numbers that its losses must have."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_adapter_contract import BASE, IDS, adapted, layers_of, trained

from moe_zoo.adapters import ADAPTERS
from moe_zoo.adapters.adapter import Tapped
from moe_zoo.adapters.arrow import direction
from moe_zoo.adapters.dynmole import normalised_tsallis, within_top_p
from moe_zoo.adapters.loramoe import variation
from moe_zoo.adapters.targets import AdapterConfig, Linear
from moe_zoo.core import param as P
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build_choice
from moe_zoo.inference import Loaded, generate
from moe_zoo.layers.mlp import MLP
from moe_zoo.models import Decoder
from moe_zoo.transform import add_adapters, average_skills, join_experts, merge

T = 6
CTX = RoutingContext(batch=2, seq=3, domain=np.array([0, 0, 0, 1, 1, -1], np.int32), train=True)
call = jax.jit(lambda adapter, x, y, w, ctx: adapter(x, y, w, ctx))


def make(in_features: int = 8, out_features: int = 6, seed: int = 0, **settings):
    """An adapter of one layer with values that matter; its input and the base's output."""
    linear = Linear("mixer.q", in_features, out_features, ("embed", "heads"))
    choice = build_choice(ADAPTERS, {"target_modules": ["mixer.*"], "r": 2, **settings}, "adapters")
    rng = np.random.default_rng(seed)
    fill = lambda var, path, value: jnp.asarray(rng.standard_normal(value.shape), jnp.float32)
    made = choice.cls(choice.config, linear)
    scale = jnp.asarray(choice.config.scales(linear)[0])
    given = {"scale": scale}
    place = lambda var, path, value: scale if path == "scale" else fill(var, path, value)
    adapter = P.materialize(made, 0, place, given)
    x, w = rng.standard_normal((T, in_features)), rng.standard_normal((in_features, out_features))
    return adapter, jnp.float32(x), jnp.float32(x @ w), jnp.float32(w)


def changed(adapter, **values):
    return P.replace(adapter, P.arrays(adapter) | {n: jnp.asarray(v, jnp.float32) for n, v in values.items()})


def run(adapter, x, y, w, ctx=CTX):
    out, aux = call(adapter, x, y, w, ctx)
    return np.asarray(out), aux


def test_scales_follow_patterns_and_rslora():
    config = AdapterConfig(("mixer.*",), r=4, lora_alpha=8.0, rank_pattern={"layers.1.*": 2}, use_rslora=True)
    scales = config.scales(Linear("mixer.q", 8, 8, (None, None), (0, 1), 2))
    np.testing.assert_allclose(scales[:, 0], [[4, 4, 4, 4], [8 / math.sqrt(2)] * 2 + [0, 0]], rtol=1e-6)


def test_one_expert_is_lora():
    plain = run(*make(name="lora"))[0]
    for settings in ({"name": "loramoe"}, {"name": "hydralora"}, {"name": "lora_mixer", "num_experts_per_tok": 1}):
        adapter, *layer = make(num_experts=1, **settings)
        lora = make(name="lora")[0]
        same = changed(adapter, a=lora.a[...], b=lora.b[...])
        np.testing.assert_allclose(run(same, *make(name="lora")[1:])[0], plain, rtol=1e-4, atol=1e-4)


def test_dropout_drops_what_the_adapter_sees_while_training():
    adapter, x, y, w = make(name="lora", lora_dropout=0.5)
    ones = jnp.ones_like(x)
    key = CTX.replace(key=jax.random.key(0))
    seen = np.asarray(adapter.dropped(ones, key))
    assert set(np.unique(seen)) == {0.0, 2.0}
    np.testing.assert_array_equal(adapter.dropped(ones, key.replace(train=False)), ones)


def test_loramoe_balances_within_types_of_tasks():
    """Two rows; experts 0, 1 are of type 1, experts 2, 3 of type 0."""
    settings = dict(name="loramoe", num_experts=4, blc_weight=0.5, blc_alpha=0.25, task_types=[1, 0])
    adapter, x, y, w = make(**settings)
    even = changed(adapter, router=np.zeros((8, 4)))
    _, aux = run(even, x, y, w)
    Q = np.full((2, 4), 3 / 4)
    importance = np.array([[1.25, 1.25, 0.75, 0.75], [2.5 / 3, 2.5 / 3, 3.5 / 3, 3.5 / 3]])  # one token of no task
    importance[1] = (2 * np.array([0.75, 0.75, 1.25, 1.25]) + 1) / 3
    values = Q * importance
    expected = 0.5 * values.var(ddof=1) / values.mean() ** 2
    np.testing.assert_allclose(aux.losses["adapter_balance"], expected, rtol=1e-5)
    _, aux = run(changed(make(**(settings | {"blc_alpha": 0.0}))[0], router=np.zeros((8, 4))), x, y, w)
    assert abs(float(aux.losses["adapter_balance"])) < 1e-9
    np.testing.assert_allclose(variation(jnp.eye(2)), 4 / 3, rtol=1e-6)


def test_mola_balance_is_one_at_uniform_and_layers_have_their_experts():
    adapter, x, y, w = make(name="mola", num_experts=4, num_experts_per_tok=4, router_aux_loss_coef=1.0)
    _, aux = run(changed(adapter, router=np.zeros((8, 4))), x, y, w)
    np.testing.assert_allclose(aux.losses["adapter_balance"], 1.0, rtol=1e-6)
    live = {where: adapter.live().tolist() for adapter, _, _, where in layers_of("mola")}
    assert live["layers.0.mixer.q"] == [True, True, False, False] and live["layers.1.mixer.q"] == [True] * 4


def test_mixlora_is_the_mixture_of_whole_networks():
    block = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)[1]), P.replace(
        adapted("mixlora"), {n: jnp.asarray(v) for n, v in trained("mixlora").items()}
    ).segments[0].blocks[0])  # fmt: skip
    x = np.random.default_rng(0).standard_normal((2, 3, 12)).astype(np.float32)
    forward = jax.jit(lambda block, x: block.adapters.feed_forward(block.ffn, x, Tapped(block.adapters, CTX)))
    got = np.asarray(forward(block, x)).reshape(T, 12)
    p = {n: np.asarray(a, np.float64) for n, a in P.arrays(block).items()}
    E = 3

    def matrix(name, e):
        a, b, scale = (p[f"adapters.ffn.{name}.{key}"][e] for key in ("a", "b", "scale"))
        return p[f"ffn.{name}"] + (a * scale[:, None]).T @ b

    for t, x_D in enumerate(x.reshape(T, 12).astype(np.float64)):
        z = x_D @ p["adapters.ffn.w_up.router"]
        kept = sorted(range(E), key=lambda e: (-z[e], e))[:2]
        g = np.exp(z[kept] - z[kept].max())
        expected = 0
        for gate, e in zip(g / g.sum(), kept):
            pre = x_D @ matrix("w_gate", e)
            expected = expected + gate * ((pre / (1 + np.exp(-pre)) * (x_D @ matrix("w_up", e))) @ matrix("w_down", e))
        np.testing.assert_allclose(got[t], expected, atol=2e-4)
    assert isinstance(block.ffn, MLP) and BASE.mlp.gated


def test_dynmole_entropy_and_kept_experts():
    uniform, certain = np.full((1, 6), 1 / 6), np.eye(6)[:1]
    np.testing.assert_allclose(normalised_tsallis(jnp.asarray(uniform), 1.1), 0.99966, atol=2e-5)
    np.testing.assert_allclose(normalised_tsallis(jnp.asarray(certain), 1.1), -0.00016, atol=2e-5)
    p = jnp.asarray([[0.1, 0.5, 0.25, 0.15]])
    np.testing.assert_allclose(normalised_tsallis(p, 2.0), (1 - (p**2).sum()) / (1 - 1 / 4), atol=1e-4)
    np.testing.assert_allclose(normalised_tsallis(p, 1), -(p * jnp.log(p)).sum() / math.log(4), atol=2e-4)
    # the expert that crosses top_p is not kept
    assert within_top_p(p, 0.76, 0).tolist() == [[False, True, True, False]]
    assert within_top_p(p, 0.74, 0).tolist() == [[False, True, False, False]]
    assert within_top_p(p, 0.0, 3).tolist() == [[False, True, True, True]]
    assert within_top_p(jnp.full((1, 4), 0.25), 0.5, 1).tolist() == [[True, True, False, False]]
    soft = make(name="dynmole", num_experts=4, entropy_threshold=0.0)
    everything = make(name="dynmole", num_experts=4, entropy_threshold=1.0, top_p=1.0)
    loramoe = make(name="loramoe", num_experts=4)
    for other in (soft, everything):
        np.testing.assert_allclose(run(*other)[0], run(*loramoe)[0], rtol=1e-4, atol=1e-4)
    adapter, x, y, w = make(name="dynmole", num_experts=4, router_aux_loss_coef=1.0)
    _, aux = run(changed(adapter, router=np.zeros((8, 4))), x, y, w)
    np.testing.assert_allclose(aux.losses["adapter_balance"], 1.0, rtol=1e-5)  # uniform and broadcast


def test_smora_gates_sum_to_k_and_the_bias_follows_the_load():
    adapter, x, y, w = make(name="smora", r=6, num_experts_per_tok=2, lora_alpha=4.0, bias_update_rate=0.1)
    adapter = changed(adapter, bias=np.zeros(6))
    _, aux = run(adapter, x, y, w)
    np.testing.assert_allclose(aux.stats["load"].total.sum(), 2 * T, rtol=1e-5)
    np.testing.assert_allclose(aux.stats["experts_per_token"].value(), 2)
    counts = np.asarray(aux.stats["mixer.q/counts"].total)
    np.testing.assert_allclose(adapter.after_step(aux.stats)["bias"], 0.1 * np.sign(2 - counts), atol=1e-7)
    # all ranks and one score: plain LoRA with alpha / r
    full = make(name="smora", r=6, num_experts_per_tok=6, lora_alpha=4.0)[0]
    full = changed(full, router=np.zeros((8, 6)), bias=np.zeros(6))
    lora = make(name="lora", r=6, lora_alpha=4.0)[0]
    lora = changed(lora, a=full.a[...].reshape(1, 6, 8), b=full.b[...].reshape(1, 6, 6))
    np.testing.assert_allclose(run(full, x, y, w)[0], run(lora, x, y, w)[0], rtol=1e-4, atol=1e-4)


def test_lora_mixer_trains_softly_and_infers_with_few():
    settings = dict(name="lora_mixer", num_experts=4, num_experts_per_tok=2)
    adapter, x, y, w = make(**settings, balance_coef=1.0, entropy_coef=-0.5)
    even = changed(adapter, router=np.zeros((8, 4)))
    _, aux = run(even, x, y, w)
    np.testing.assert_allclose(aux.losses["adapter_balance"], 1 / 4, rtol=1e-5)
    np.testing.assert_allclose(aux.losses["adapter_entropy"], -0.5 * math.log(4), rtol=1e-5)
    _, aux = run(adapter, x, y, w, CTX.replace(train=False))
    np.testing.assert_allclose(aux.stats["experts_per_token"].value(), 2)
    np.testing.assert_allclose(aux.stats["load"].total.sum(), T, rtol=1e-5)
    top, inference = make(**settings, routing="hard_soft")[0], CTX.replace(train=False)
    np.testing.assert_allclose(run(top, x, y, w)[0], run(adapter, x, y, w, inference)[0], rtol=1e-4, atol=1e-4)
    # backwards it is soft: the router hears from experts that were not kept, as in soft routing and not as in top-k
    out = lambda made, router, ctx: call(changed(made, router=router), x, y, w, ctx)[0].sum()
    slope = lambda made, ctx=CTX: np.asarray(jax.grad(lambda router: out(made, router, ctx))(made.router[...]))
    np.testing.assert_allclose(slope(top), slope(adapter), rtol=1e-4, atol=1e-4)
    assert np.abs(slope(adapter, inference) - slope(adapter)).max() > 1e-2


def test_poly_and_its_heads():
    one, x, y, w = make(name="poly", num_skills=1, num_tasks=2)
    lora = changed(make(name="lora")[0], a=one.a[...], b=one.b[...])
    np.testing.assert_allclose(run(one, x, y, w)[0], run(lora, x, y, w)[0], rtol=1e-4, atol=1e-4)
    poly = make(name="poly", num_skills=3, num_tasks=2)[0]
    heads = make(name="poly", num_skills=3, num_tasks=2, num_splits=2)[0]
    same = np.broadcast_to(np.asarray(poly.logits[...]), (2, 2, 3))
    heads = changed(heads, a=poly.a[...], b=poly.b[...], logits=same)
    np.testing.assert_allclose(run(heads, x, y, w)[0], run(poly, x, y, w)[0], rtol=1e-4, atol=1e-4)
    # a token of no task: the average of A and of B
    mean = changed(lora, a=poly.a[...].mean(0, keepdims=True), b=poly.b[...].mean(0, keepdims=True))
    np.testing.assert_allclose(run(poly, x, y, w)[0][5], run(mean, x, y, w)[0][5], rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="num_splits: 3 heads do not divide 8 dims of 'mixer.q'"):
        make(name="poly", num_splits=3)


def test_averaged_skills_are_what_a_new_task_begins_from():
    poly = P.replace(adapted("mhr"), {n: jnp.asarray(v) for n, v in trained("mhr").items()})
    mu = average_skills(Loaded(poly, poly.config, None))
    assert mu.config.adapters.name == "lora" and mu.config.adapters.config.r == 3
    logits = jax.jit(lambda model: model(IDS)[0])  # no task is known
    np.testing.assert_allclose(logits(mu.model), logits(poly), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="expected adapters 'poly', got 'lora'"):
        average_skills(mu)


def test_stacked_buffers_move_once_a_step_and_are_the_adapters_own():
    model = P.replace(adapted("smora"), {n: jnp.asarray(v) for n, v in trained("smora").items()})
    domain = np.zeros(IDS.shape, np.int32)
    _, aux, _ = jax.jit(lambda m, ids: m(ids, domain=domain, train=True))(model, IDS)
    new = model.after_step(aux.stats)
    buffers = {n for n, var in P.flat(model).items() if isinstance(var, P.Buffer)}
    assert new.keys() == buffers and len(buffers) == 6
    for path, value in new.items():
        moved = np.asarray(value) - np.asarray(P.arrays(model)[path])
        assert moved.shape == (2, 6) and np.abs(moved).max() == pytest.approx(0.1, abs=1e-5)


def test_xlora_mixes_as_its_classifier_says_of_the_base_and_decodes():
    """Its second pass with gates that are the same for all tokens is the mixture merged at those."""
    values = {n: jnp.asarray(v) for n, v in trained("xlora").items()}
    values["adapters.kernel"] = jnp.zeros_like(values["adapters.kernel"])
    forward = jax.jit(lambda model: model(IDS)[0])
    gates = np.array([0.7, 0.1, 0.2])
    same = P.replace(adapted("xlora"), values | {"adapters.bias": jnp.log(jnp.float32(gates))})
    merged = merge(Loaded(same, same.config, None), gates)
    np.testing.assert_allclose(forward(same), forward(merged.model), atol=2e-4)
    # what it decides by is the base's hidden state, which a head that is the identity shows
    model = P.replace(adapted("xlora"), {n: jnp.asarray(v) for n, v in trained("xlora").items()})
    D, V = model.config.hidden_size, model.config.vocab_size
    plain = merge(Loaded(model, model.config, None), [0.0] * 3).model
    shown = P.replace(plain, P.arrays(plain) | {"head.kernel": jnp.eye(D, V)})
    h = np.asarray(forward(shown), np.float64)[..., :D].reshape(-1, D)
    logits = h @ np.asarray(model.adapters.kernel[...]) + np.asarray(model.adapters.bias[...])
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    _, aux, _ = jax.jit(lambda m: m(IDS))(model)
    linears = len(model.segments[0].blocks[0].adapters)
    np.testing.assert_allclose(aux.stats["segments.0.blocks.0"]["load"].total[0], linears * expected.sum(0), rtol=1e-4)
    text = np.asarray(IDS[:1, :3])
    for _ in range(3):
        text = np.concatenate([text, np.asarray(jax.jit(lambda i: model(i)[0])(text))[:, -1:].argmax(-1)], axis=1)
    np.testing.assert_array_equal(generate(model, [IDS[0, :3]], 3, temperature=0.0)[0], text[0, 3:])


def test_gates_that_were_learned_alone_become_the_router():
    """Two runs of PHATGOOSE's first stage, joined: experts and gates side by side; a layer that one leaves out."""
    base = Loaded(P.materialize(Decoder(BASE), 0), BASE, None)
    learned = []
    for seed, settings in enumerate([{"r": 2, "target_modules": ["q", "v"]}, {"r": 3, "layers_to_transform": [1]}]):
        made = add_adapters(base, {"name": "phatgoose", "target_modules": ["q"], **settings})
        rng, values = np.random.default_rng(seed), P.arrays(made.model)
        for name in [n for n in values if n.endswith((".a", ".b", ".router"))]:
            values[name] = jnp.float32(rng.standard_normal(values[name].shape))
        made.model = P.replace(made.model, values)
        learned.append(made)
    joined = join_experts(base, learned, {"name": "phatgoose", "stage": "route"})
    values, prefix = P.arrays(joined.model), "segments.0.blocks.0.adapters.mixer"
    assert joined.config.adapters.config.num_experts == 2
    live = lambda name: (np.asarray(values[f"{prefix}.{name}.scale"]) != 0).any(-1).tolist()
    assert live("q") == [[True, False], [True, True]] and live("v") == [[True, False], [True, False]]
    for e, (model, R) in enumerate(zip(learned, (2, 3))):
        own = P.arrays(model.model)
        np.testing.assert_array_equal(values[f"{prefix}.q.a"][1, e, :R], own[f"{prefix}.q.a"][1, 0])
        np.testing.assert_array_equal(values[f"{prefix}.q.router"][1, :, e], own[f"{prefix}.q.router"][1, :, 0])
    assert not np.asarray(values[f"{prefix}.q.b"])[1, 0, 2:].any()
    for name, value in P.arrays(join_experts(base, learned, "glider").model).items():
        np.testing.assert_array_equal(value, values.get(name, 0), err_msg=name)
    # Arrow's router follows from the experts, whatever gates they come with
    arrow = P.arrays(join_experts(base, learned, {"name": "arrow", "num_experts_per_tok": 2}).model)
    a_RD, b_RN = (np.asarray(arrow[f"{prefix}.q.{key}"])[1, 1] for key in ("a", "b"))
    scale_R = np.asarray(arrow[f"{prefix}.q.scale"])[1, 1]
    np.testing.assert_allclose(
        arrow[f"{prefix}.q.router"][1, :, 1], direction(a_RD * scale_R[:, None], b_RN), rtol=1e-5
    )
    assert not np.asarray(arrow[f"{prefix}.q.router"])[0, :, 1].any()  # a layer that an expert leaves out
    drawn = join_experts(base, learned, "mole")
    assert np.asarray(P.arrays(drawn.model)[f"{prefix}.q.router"]).shape[1:] == (2, 12, 2)
    with pytest.raises(ConfigError, match="experts of 'smora' are no LoRAs of their own"):
        join_experts(base, learned, "smora")
