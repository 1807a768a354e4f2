"""What every router must keep, present and future: one layer, one decoder, the same questions for all.

A new router is covered by adding a line to CASES.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import attention_view

from moe_zoo.blocks.moe import MoE
from moe_zoo.core import param as P
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.decision import Dense, ExpertChoice, Soft, TokenChoice
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build
from moe_zoo.models import Decoder, ModelConfig
from moe_zoo.models.decoder import per_layer_terms
from moe_zoo.routing import ROUTERS
from moe_zoo.sharding import make_mesh
from moe_zoo.train.config import load_config
from moe_zoo.train.step import Trainer

B, S, D, E, F = 2, 6, 16, 4, 12
T = B * S


@dataclasses.dataclass(frozen=True)
class Case:
    """A router with the settings, dispatcher and losses it is tried with."""

    router: dict
    dispatch: str = "dropless"
    losses: tuple = ("load_balance", "z_loss")
    objective: str = "next_token"


CASES = {
    "top_k": Case({"name": "top_k"}),
    "top_k_sigmoid_bias": Case(
        {"name": "top_k", "score_function": "sigmoid", "correction_bias": True, "bias_update_rate": 0.01}
    ),
    "top_k_capacity": Case({"name": "top_k"}, dispatch="capacity"),
    "top_p": Case({"name": "top_p"}, losses=("load_balance", "entropy_loss")),
    "sparsemixer": Case({"name": "sparsemixer"}),
    "switch": Case({"name": "switch", "jitter": 0.0}),
    "expert_choice_sequence": Case({"name": "expert_choice"}, dispatch="slots", losses=()),
    "expert_choice_batch": Case({"name": "expert_choice", "group": "batch"}, dispatch="slots", losses=()),
    "sparse_ot": Case({"name": "sparse_ot"}, dispatch="slots", losses=()),
    "relu": Case({"name": "relu"}, losses=(), objective="adaptive_sparsity"),
    "relu_everywhere": Case({"name": "relu"}, dispatch="everywhere", losses=(), objective="adaptive_sparsity"),
    "block_ffn": Case({"name": "block_ffn"}, losses=("locality", "chunk_sparsity")),
    "null_experts": Case(
        {"name": "null_experts", "num_null_experts": 1, "picks_per_token": 2}, losses=("null_load_balance", "z_loss")
    ),
    "pre_gate": Case({"name": "pre_gate", "gate": "prob", "size": 8}),
    "recurrent": Case({"name": "recurrent", "recurrent_size": 8}),
    "soft": Case({"name": "soft", "slots_per_expert": 2}, dispatch="slots", losses=()),
    "sinkhorn": Case({"name": "sinkhorn", "num_experts_per_tok": 2}),
    "smoe_dropout": Case({"name": "smoe_dropout", "k_min": 1, "k_max": 3, "total_steps": 10}, losses=()),
    "gshard": Case({"name": "gshard"}, dispatch="capacity"),
    "hybrid_k": Case({"name": "hybrid_k"}),
    "modality_groups": Case({"name": "modality_groups"}, losses=("z_loss",)),
    "noisy_top_k": Case({"name": "noisy_top_k"}, losses=("importance", "expected_load")),
    "hash": Case({"name": "hash"}, losses=()),
    "duo_llm": Case({"name": "duo_llm"}, losses=(), objective="global_budget"),
    "thor": Case({"name": "thor"}, losses=(), objective="thor"),
    "similarity_aware": Case({"name": "similarity_aware"}),
    "attention_aware": Case({"name": "attention_aware"}),
}
CAUSAL = [name for name, case in CASES.items() if ROUTERS.get(case.router["name"]).causal]


def model_config(name: str, **changes) -> ModelConfig:
    case = CASES[name]
    settings = {
        "vocab_size": 32,
        "hidden_size": D,
        "layers": "2*moe",
        "num_experts": E,
        "moe_intermediate_size": F,
        "attention": {"num_attention_heads": 2},
        "router": {**case.router, **({"init_std": 0.5} if "init_std" in fields(case) else {})},
        "dispatch": {"name": case.dispatch},
        "losses": {loss: {} for loss in case.losses},
    }
    return build(ModelConfig, {**settings, **changes}, "model")


def fields(case: Case) -> set[str]:
    return {f.name for f in dataclasses.fields(ROUTERS.get(case.router["name"]).Config)}


@functools.cache
def decoder(name: str, seed: int = 0, **changes) -> Decoder:
    return P.materialize(Decoder(model_config(name, **changes)), seed)


@functools.cache
def layer(name: str) -> tuple[MoE, object]:
    """(the first routed layer, what its routers share)."""
    return first_layer(decoder(name))


def first_layer(model: Decoder) -> tuple[MoE, object]:
    block = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)[0]), model.segments[0].blocks[0])
    return block.ffn, dict(model.shared).get(block.ffn.router_name)


# One program for each router and shape, shared by the tests.
call_layer = jax.jit(lambda moe, x, ctx: moe(x, ctx))
before_layers = jax.jit(lambda shared, ctx: shared.before_layers(ctx, None)[0])
call_model = jax.jit(lambda model, ids: model(ids, step=jnp.int32(3)))
call_cached = jax.jit(lambda model, ids, cache: model(ids, cache=cache, step=jnp.int32(3))[::2])


def context(name: str, batch: int = B, seq: int = S, **changes) -> RoutingContext:
    """Of tokens that are all valid, said by a mask: with and without padding it is one program."""
    moe, shared = layer(name)
    ids = np.random.default_rng(5).integers(0, 32, batch * seq).astype(np.int32)
    carry, valid = moe.router.init_carry(batch * seq), np.ones(batch * seq, bool)
    fixed = dict(token_ids=ids, domain=ids % 3, step=jnp.int32(4), key=jax.random.key(0), carry=carry, shared=shared)
    given = {**fixed, "valid": valid, **changes}
    if "attention" in moe.router.requires:
        given = {"attention": attention_view(batch, seq, D, valid_T=given["valid"]), **given}
    ctx = RoutingContext(batch=batch, seq=seq, **given)
    return ctx if ctx.shared is None else ctx.replace(shared=before_layers(ctx.shared, ctx.replace(shared=None)))


def tokens(n: int = T, seed: int = 0):
    return np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32)


def run(name, x_TD, ctx):
    moe, _ = layer(name)
    y, aux, routing = call_layer(moe, x_TD.reshape(ctx.batch, ctx.seq, D), ctx)
    return y.reshape(x_TD.shape), aux, routing


def expert(bank, e: int, x: np.ndarray) -> np.ndarray:
    gate, up, down = (np.asarray(w[...])[e].astype(np.float64) for w in (bank.w_gate, bank.w_up, bank.w_down))
    g = x @ gate
    return (g / (1 + np.exp(-g)) * (x @ up)) @ down


def naive(decision, bank, x_TD) -> np.ndarray:
    """The layer's output from its decision, one token and one expert at a time."""
    x, y = np.asarray(x_TD, np.float64), np.zeros((x_TD.shape[0], D))
    decision = jax.tree.map(np.asarray, decision)
    if isinstance(decision, TokenChoice):
        for t in range(len(x)):
            for e, gate in zip(decision.experts[t], decision.gates[t].astype(np.float64)):
                if e < decision.num_experts:
                    y[t] += gate * expert(bank, e, x[t])
    elif isinstance(decision, Dense):
        for t in range(len(x)):
            for e in range(decision.gates.shape[1]):
                y[t] += float(decision.gates[t, e]) * expert(bank, e, x[t])
    elif isinstance(decision, ExpertChoice):
        G, num_experts, C = decision.tokens.shape
        size = len(x) // G
        for g, e, c in np.ndindex(G, num_experts, C):
            t = int(decision.tokens[g, e, c])
            if t < size:
                y[g * size + t] += float(decision.gates[g, e, c]) * expert(bank, e, x[g * size + t])
    else:
        G, size, num_experts, C = decision.dispatch.shape
        for g, e, c in np.ndindex(G, num_experts, C):
            rows = slice(g * size, (g + 1) * size)
            slot = decision.dispatch[g, :, e, c].astype(np.float64) @ x[rows]
            y[rows] += np.outer(decision.combine[g, :, e, c].astype(np.float64), expert(bank, e, slot))
    return y


def test_every_router_has_a_case():
    assert {case.router["name"] for case in CASES.values()} == set(ROUTERS.names())


@pytest.mark.parametrize("name", CASES)
def test_layer_equals_a_loop_over_tokens_and_experts(name):
    x = tokens()
    y, _, routing = run(name, x, context(name))
    np.testing.assert_allclose(y, naive(routing.decision, layer(name)[0].experts, x), atol=2e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("train", [False, True])
def test_gates_are_finite_and_weigh_at_least_one_expert_per_used_token(name, train):
    _, aux, routing = run(name, tokens(), context(name, **(dict(train=True, valid=None) if train else {})))
    decision = routing.decision
    if isinstance(decision, TokenChoice):
        assert decision.experts.dtype == jnp.int32
        assert bool((decision.live().sum(-1) >= 1).all())
        assert bool(jnp.where(decision.live(), True, decision.gates == 0).all())
        ids = np.sort(np.asarray(decision.experts), axis=-1)
        assert not ((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] < E)).any()  # no expert twice
    if isinstance(decision, Soft):
        np.testing.assert_allclose(decision.dispatch.sum(1), 1, atol=1e-5)
        np.testing.assert_allclose(decision.combine.sum((2, 3)), 1, atol=1e-5)
    if isinstance(decision, ExpertChoice):
        for g, e in np.ndindex(*decision.tokens.shape[:2]):
            taken = np.asarray(decision.tokens[g, e])
            taken = taken[taken < S * B // len(decision.tokens)]  # places may stay empty
            assert len(set(taken.tolist())) == len(taken) > 0
    for leaf in jax.tree.leaves((decision, aux)):
        assert bool(jnp.isfinite(leaf.astype(jnp.float32)).all())
    assert "load" in aux.stats and float(aux.stats["load"].total.sum()) > 0


@pytest.mark.parametrize("name", CASES)
def test_padding_changes_nothing(name):
    """Two rows with a padded tail: valid tokens as if the tail held anything else, padding gets nothing."""
    case = CASES[name]
    valid = np.ones((B, S), bool)
    valid[:, S - 2 :] = False
    flat = valid.reshape(-1)
    x = tokens()
    other = np.where(flat[:, None], x, 7 * tokens(seed=9))
    ctx = context(name, valid=flat)
    (y, aux, _), (z, other_aux, _) = run(name, x, ctx), run(name, other, ctx)
    np.testing.assert_allclose(y[flat], z[flat], atol=1e-6)
    np.testing.assert_array_equal(np.asarray(y)[~flat], 0)
    for a, b in zip(jax.tree.leaves(aux), jax.tree.leaves(other_aux)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    if case.router["name"] in ("expert_choice", "soft", "sparse_ot"):
        return  # capacity and slots follow the padded length
    ids = dict(token_ids=ctx.token_ids[flat], domain=ctx.domain[flat])
    short, _, _ = run(name, x[flat], context(name, seq=S - 2, valid=None, **ids))
    np.testing.assert_allclose(y[flat], short, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("hash", "modality_groups", "thor")])
def test_relabelling_experts_relabels_the_decision_and_leaves_the_output(name):
    model = decoder(name)
    order = np.array([2, 0, 3, 1])
    moved = {}
    for path, var in P.flat(model).items():
        value = var.get_value()
        for axis, kind in enumerate(var.logical_axes):
            if kind in ("expert", "expert_logits"):
                value = np.take(np.asarray(value), order, axis=axis)
        moved[path] = value
    ids = np.random.default_rng(1).integers(0, 32, (B, 2 * S)).astype(np.int32)
    (a, aux, _), (b, moved_aux, _) = call_model(model, ids), call_model(P.replace(model, moved), ids)
    np.testing.assert_allclose(a, b, atol=2e-5)
    load = lambda aux: aux.stats["segments.0.blocks.0"]["load"].total
    np.testing.assert_allclose(np.asarray(load(aux))[:, order], load(moved_aux), atol=1e-5)


@pytest.mark.parametrize("name", ["expert_choice_sequence", "relu_everywhere"])
def test_gradient_reaches_trained_parameters_and_no_others(name):
    """What tests/train/test_mesh.py, where every router is, has not."""
    model = decoder(name)
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 32, (4, 8)), jnp.int32)
    trained = {n: v.get_value() for n, v in P.flat(model).items() if not isinstance(v, P.Buffer | P.Frozen)}
    fixed = {n: v.get_value() for n, v in P.flat(model).items() if n not in trained}

    @jax.jit
    @jax.grad
    def gradient(trained):
        whole = P.replace(model, {**trained, **fixed})
        logits, aux, _ = whole(ids, train=True, step=jnp.int32(9), key=jax.random.key(0))
        return jnp.mean(jnp.sin(logits)) + aux.total_loss()

    for path, g in jax.device_get(gradient(trained)).items():
        assert np.isfinite(g).all(), path
        if "ffn" in path or "shared" in path:
            assert np.abs(g).max() > 0, f"no gradient reaches {path}"
    frozen = {n for n in fixed if ".router." in n}
    assert all(
        isinstance(P.flat(model)[n], P.Frozen | P.Buffer) for n in frozen
    )  # the frozen router's path into x is tested with its own router


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("hash", "soft")])
def test_all_tokens_alike_and_a_single_token_work(name):
    same = np.tile(tokens(1), (T, 1))
    y, _, _ = run(name, same, context(name, token_ids=np.zeros(T, np.int32), domain=np.zeros(T, np.int32)))
    if name in CAUSAL and "capacity" not in name and name != "thor":  # thor draws, alike or not
        np.testing.assert_allclose(y, np.tile(y[:1], (T, 1)), atol=1e-5)
    one, _, routing = run(name, tokens(1), context(name, batch=1, seq=1))
    np.testing.assert_allclose(one, naive(routing.decision, layer(name)[0].experts, tokens(1)), atol=2e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num_experts", [1, E], ids=["one_expert", "all_experts"])
def test_one_expert_and_all_experts_equal_the_loop(name, num_experts):
    """E = 1, and K = E where there is a K."""
    K = [
        k
        for k in ("num_experts_per_tok", "expected_active", "k_min", "k_max", "num_groups")
        if k in fields(CASES[name])
    ]
    settings = {**CASES[name].router, **{k: num_experts for k in K}}
    model = decoder(name, num_experts=num_experts, router=HashableDict(settings))
    moe, shared = first_layer(model)
    y, _, routing = call_layer(moe, tokens().reshape(B, S, D), context(name, shared=shared))
    np.testing.assert_allclose(y.reshape(T, D), naive(routing.decision, moe.experts, tokens()), atol=2e-5)
    if isinstance(routing.decision, TokenChoice) and K:
        np.testing.assert_array_equal(routing.decision.counts(), T)


class HashableDict(dict):
    """For functools.cache."""

    def __hash__(self):
        return hash(tuple(sorted(self.items())))


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_finite_and_close(name):
    ids = np.random.default_rng(1).integers(0, 32, (B, 2 * S)).astype(np.int32)
    wide, narrow = (call_model(model, ids)[0] for model in (decoder(name), decoder(name, dtype="bfloat16")))
    assert bool(jnp.isfinite(narrow).all())
    # a token whose routing flips may differ: most must not
    assert float(jnp.median(jnp.abs(wide - narrow))) < 0.05


@pytest.mark.parametrize("name", CASES)
def test_causality_is_as_claimed(name):
    """Changing the last token changes no earlier logits, exactly where the router says so."""
    model = decoder(name)
    rng = np.random.default_rng(2)
    ids = rng.integers(0, 32, (B, 2 * S)).astype(np.int32)
    changed = ids.copy()
    changed[:, -1] = (changed[:, -1] + 5) % 32
    logits, other = (np.asarray(call_model(model, t)[0]) for t in (ids, changed))
    difference = np.abs(logits[:, :-1] - other[:, :-1]).max()
    if name in CAUSAL:
        assert difference < 1e-5
    else:
        assert difference > 1e-4


@pytest.mark.parametrize("name", CAUSAL)
def test_cached_decoding_equals_the_parallel_form(name):
    model = decoder(name)
    ids = np.random.default_rng(3).integers(0, 32, (B, 2 * S)).astype(np.int32)
    cache, parts = model.init_cache(B, 2 * S + 1), []
    for chunk in np.split(ids, [2 * S - 3, 2 * S - 2, 2 * S - 1], axis=1):
        logits, cache = call_cached(model, chunk, cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), call_model(model, ids)[0], atol=2e-5)


@pytest.mark.parametrize("name", ["top_k", "relu", "expert_choice_sequence", "soft"])
def test_recorded_decisions_of_every_type_played_back_give_the_same_logits(name):
    model = decoder(name)
    ids = np.random.default_rng(3).integers(0, 32, (B, S)).astype(np.int32)
    logits, aux = jax.jit(lambda ids: model(ids, record=True)[:2])(ids)
    given = aux.terms()["segments.0.blocks.0"]["router_decision"]  # stacked over the two layers
    again = jax.jit(lambda ids, given: model(ids, inputs={"given": given})[0])(ids, given)
    np.testing.assert_allclose(logits, again, atol=1e-6)
    layers = per_layer_terms(aux.layers)["router_decision"]
    assert [type(layer) for layer in layers] == [ROUTERS.get(CASES[name].router["name"]).decision] * 2
    for layer, decision in enumerate(layers):
        for one, whole in zip(jax.tree.leaves(decision), jax.tree.leaves(given), strict=True):
            np.testing.assert_array_equal(one, whole[layer])


@pytest.mark.parametrize("name", ["relu_everywhere"])
def test_it_trains(name):
    """What no config of the zoo has: every router trains in tests/train/test_configs.py."""
    case, config = CASES[name], load_config("quickstart:tiny", [("optim.warmup_steps", "0")])
    objective = load_config("quickstart:tiny", [("train.objective.name", case.objective)]).train
    config = dataclasses.replace(config, model=model_config(name, vocab_size=264), train=objective)
    trainer = Trainer(config, make_mesh(devices=jax.devices()[:1]), config.train.objective.make())
    state, losses = trainer.init_state(), []
    rows = (np.arange(33) * 7 + np.arange(8)[:, None]) % 40
    batch = {
        "tokens": rows[:, :-1], "targets": rows[:, 1:], "segment_ids": np.ones((8, 32)),
        "positions": np.tile(np.arange(32), (8, 1)), "domain": np.zeros((8, 32)),
    }  # fmt: skip
    batch = {k: v.astype(np.int32) for k, v in batch.items()} | {"loss_mask": np.ones((8, 32), bool)}
    for _ in range(6):
        state, stats = trainer.train_step(state, batch, np.float32(0))
        losses.append(float(stats["scalars"]["loss"]))
    assert losses[-1] < losses[0] - 0.1, losses


def test_a_loss_or_dispatcher_that_does_not_fit_the_router_is_an_error():
    with pytest.raises(ConfigError, match="'load_balance'.*Dense|Dense.*load_balance"):
        model_config("relu", losses={"load_balance": {}})
    with pytest.raises(ConfigError, match="needs the router's logits.*'hash'"):
        model_config("hash", losses={"z_loss": {}})
    with pytest.raises(ConfigError, match="'dropless' takes.*expert_choice.*fitting: slots"):
        model_config("expert_choice_batch", dispatch={"name": "dropless"})
