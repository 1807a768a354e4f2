"""One step on each mesh axis alone and mixed against one device: loss and every gradient."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_zoo.core.schema import build
from moe_zoo.models import ModelConfig
from moe_zoo.routing import ROUTERS as registry
from moe_zoo.sharding import MeshConfig, make_mesh
from moe_zoo.train.config import load_config
from moe_zoo.train.step import Trainer

MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "expert": MeshConfig(data=1, expert=8),
    "tensor": MeshConfig(data=2, tensor=4),
    "mixed": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
}
ROUTERS = {
    "top_k": ({"name": "top_k"}, "dropless", ("load_balance", "z_loss"), "next_token"),
    "top_k_capacity": ({"name": "top_k"}, "capacity", ("load_balance",), "next_token"),
    "sigmoid_bias": (
        {"name": "top_k", "score_function": "sigmoid", "correction_bias": True, "bias_update_rate": 0.01},
        "dropless", (), "next_token",
    ),
    "switch": ({"name": "switch"}, "capacity", ("load_balance",), "next_token"),
    "expert_choice": ({"name": "expert_choice", "group": "batch"}, "slots", (), "next_token"),
    # near equal scores Adam's first step on the dual is the sign of a rounding error
    "sparse_ot": ({"name": "sparse_ot", "init_std": 0.5}, "slots", (), "next_token"),
    "relu_budget": ({"name": "relu"}, "dropless", (), "adaptive_sparsity"),
    # at the paper's alpha of 100 the locality loss magnifies float32 rounding beyond the tolerance
    "block_ffn": (
        {"name": "block_ffn", "init_std": 0.5}, "dropless",
        {"locality": {"alpha": 10.0}, "chunk_sparsity": {}}, "next_token",
    ),
    "null_experts": (
        {"name": "null_experts", "num_null_experts": 6, "init_std": 0.5}, "dropless", ("null_load_balance", "z_loss"),
        "next_token",
    ),
    "pre_gate": (
        {"name": "pre_gate", "gate": "prob", "size": 16, "num_attention_heads": 4}, "dropless", ("load_balance",),
        "next_token",
    ),
    "recurrent": ({"name": "recurrent", "recurrent_size": 8}, "dropless", ("load_balance",), "next_token"),
    "soft": ({"name": "soft", "slots_per_expert": 2}, "slots", (), "next_token"),
    "smoe_dropout": ({"name": "smoe_dropout"}, "dropless", (), "next_token"),
    "gshard": ({"name": "gshard"}, "capacity", {"load_balance": {"choices": "first"}}, "next_token"),
    "hybrid_k": ({"name": "hybrid_k", "init_std": 0.5}, "dropless", (), "next_token"),
    "modality_groups": ({"name": "modality_groups", "init_std": 0.5}, "dropless", (), "next_token"),
    "noisy_top_k": (
        {"name": "noisy_top_k", "init_std": 0.02}, "dropless", ("importance", "expected_load"), "next_token",
    ),
    "sinkhorn": ({"name": "sinkhorn"}, "dropless", ("z_loss",), "next_token"),
    "hash": ({"name": "hash"}, "dropless", (), "next_token"),
    "thor": ({"name": "thor"}, "dropless", (), "thor"),
    "duo_llm": ({"name": "duo_llm", "init_std": 0.5}, "dropless", (), "global_budget"),
    "top_p": (
        {"name": "top_p", "init_std": 0.5, "controller_rate": 0.1}, "dropless",
        ("load_balance", "entropy_loss"), "next_token",
    ),
    "sparsemixer": ({"name": "sparsemixer"}, "dropless", (), "next_token"),
    "similarity_aware": ({"name": "similarity_aware", "init_std": 0.5}, "dropless", ("load_balance",), "next_token"),
    "attention_aware": ({"name": "attention_aware", "init_std": 0.5}, "dropless", ("load_balance",), "next_token"),
}  # fmt: skip
#: settings of the model that a router is for
MADE_FOR = {"duo_llm": {"num_experts": 2, "experts": {"name": "big_small", "ratio": 2}}}
COMPETING = ("expert_choice", "modality_groups", "relu_budget", "sparse_ot")
# Each token by itself, through top-k's own dispatch: on a mesh nothing is theirs alone. `make meshes` has them.
# (The bank of duo_llm, which no axis splits by expert, is on a mesh in tests/routing/test_duo_llm.py.)
ALIKE = ("duo_llm", "hash", "hybrid_k", "noisy_top_k", "null_experts", "smoe_dropout", "sparsemixer")
# In float32, top-k on each axis alone and one router for each other dispatcher and kind of decision on the mixed mesh:
# there other routers follow one device in float64, below. MOE_ZOO_ALL_MESHES=1 (`make meshes`) tries all on all.
ALL = os.environ.get("MOE_ZOO_ALL_MESHES") == "1"
IN_FLOAT32 = ("top_k_capacity", "expert_choice", "soft")
PAIRS = [
    (router, mesh)
    for router in ROUTERS
    for mesh in MESHES
    if ALL or router == "top_k" or (router in IN_FLOAT32 and mesh == "mixed")
]


def settings(router: str, **changes):
    chosen, dispatch, losses, objective = ROUTERS[router]
    budget = {"row_budget": 3.0} if router == "relu_budget" else {}
    model = build(
        ModelConfig,
        {
            "vocab_size": 264, "hidden_size": 32, "layers": "1*dense 1*moe", "intermediate_size": 64, "num_experts": 8,
            "moe_intermediate_size": 16, "shared_expert_size": 16,
            "attention": {"num_attention_heads": 4},
            "router": chosen, "dispatch": {"name": dispatch, **budget},
            "losses": losses if isinstance(losses, dict) else {name: {} for name in losses},
            **MADE_FOR.get(router, {}), **changes,
        },
        "model",
    )  # fmt: skip
    base = load_config("quickstart:tiny", [("train.objective.name", objective), ("optim.warmup_steps", "0")])
    return dataclasses.replace(base, model=model)


@functools.cache
def batch(B: int = 8, S: int = 16):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (B, S + 1)).astype(np.int32)
    segments = np.where(np.arange(S) < rng.integers(4, S, (B, 1)), 1, 2).astype(np.int32)
    segments[0, -3:] = 0  # padding
    return {
        "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments,
        "positions": np.tile(np.arange(S, dtype=np.int32), (B, 1)), "domain": segments - 1,
        "loss_mask": segments > 0,
    }  # fmt: skip


POINTS = 5  # of training, three steps apart


def trainer_on(router: str, mesh_config: MeshConfig | None) -> Trainer:
    config = settings(router)
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh_config is None else make_mesh(mesh_config)
    return Trainer(config, mesh, config.train.objective.make())


def gradients(trainer: Trainer, states):
    """For each state: (loss and router losses, {path: gradient}, load) of the same batch."""
    data = dict(batch())
    weights = data.pop("loss_mask").astype(np.float32)
    data["loss_weights"] = weights / weights.sum()
    data = jax.device_put(data, trainer.batch_sharding)
    step = jax.jit(trainer._gradients, in_shardings=(trainer.state_shardings, trainer.batch_sharding, None, None))
    results = []
    for state in states:
        state = jax.device_put(state, trainer.state_shardings)
        grads, stats = jax.device_get(step(state, data, jnp.int32(3), jax.random.key(0)))
        scalars = {name: stat.value() for name, stat in stats["scalars"].items()}
        results.append((scalars, grads, stats["layers"]["segments.1.blocks.0"]["load"].total))
    return results


@functools.cache
def alone(router: str):
    """(states at five points of training on one device, what `gradients` says of each)."""
    trainer = trainer_on(router, None)
    state, states = trainer.init_state(), []
    if trainer.config.train.objective.name == "adaptive_sparsity":
        state["objective"]["coefficient"] += 0.5  # so that the penalty counts
    for point in range(POINTS):
        states.append(jax.device_get(state))
        for _ in range(3 if point < POINTS - 1 else 0):
            state, _ = trainer.train_step(state, batch(), np.float32(0))
    return states, gradients(trainer, states)


def test_every_router_is_here():
    assert {chosen["name"] for chosen, *_ in ROUTERS.values()} == set(registry.names())


@pytest.mark.parametrize("router, mesh", PAIRS)
def test_loss_and_gradients_equal_one_device_at_five_points_of_training(router, mesh):
    states, expected = alone(router)
    for (scalars, grads, load), (one_scalars, one_grads, one_load) in zip(
        gradients(trainer_on(router, MESHES[mesh]), states), expected, strict=True
    ):
        for name, value in one_scalars.items():
            np.testing.assert_allclose(scalars[name], value, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(load, one_load, atol=1e-4)
        assert grads.keys() == one_grads.keys()
        for path, value in one_grads.items():
            scale = max(float(np.abs(value).max()), 1e-3)
            np.testing.assert_allclose(grads[path], value, atol=1e-5 * scale + 1e-7, err_msg=path)


@pytest.mark.parametrize("mesh", ["expert", "mixed"])
def test_no_device_holds_more_than_its_shard(mesh):
    config = settings("top_k")
    trainer = Trainer(config, make_mesh(MESHES[mesh]), config.train.objective.make())
    state = trainer.init_state()
    up = state["trainable"]["segments.1.blocks.0.ffn.experts.w_up"]
    assert {shard.data.size for shard in up.addressable_shards} == {up.size // 8}
    moments = [x for x in jax.tree.leaves(state["opt"]) if getattr(x, "shape", None) == up.shape]
    assert moments and all({s.data.size for s in m.addressable_shards} == {up.size // 8} for m in moments)


def test_initial_values_do_not_depend_on_the_mesh():
    config = settings("top_k")
    states = [
        Trainer(config, make_mesh(MESHES[mesh]), config.train.objective.make()).init_state()
        for mesh in ("data", "mixed")
    ]
    for path, value in states[0]["trainable"].items():
        np.testing.assert_array_equal(value, states[1]["trainable"][path], err_msg=path)


@pytest.mark.parametrize("router", [router for router in ROUTERS if ALL or router not in ALIKE])
def test_twenty_steps_in_float64_follow_one_device(router):
    """In float32 one flipped top-k choice makes two curves part after some steps; in float64 they stay together.

    The data is skewed (one token makes up most of it) and the batch is cut into two micro-batches. All that a step
    reports is compared at every step: losses, loads, the norm of each gradient; at the end the weights, and Adam's
    moments, which keep every gradient of the run in its true size.
    """
    with jax.enable_x64(True):
        (told, state), (sharded_told, sharded_state) = curve(router, None), curve(router, MESHES["mixed"])
    losses = [step["scalars"]["loss"] for step in told]
    assert losses[-1] < losses[0] - 0.05
    for path in told[0]["gradient_norms"]:
        sizes = np.array([step["gradient_norms"][path] for step in told])
        assert np.isfinite(sizes).all(), path
        if "ffn" in path or "shared" in path:
            assert (sizes.max(0) > 0).all(), f"no gradient reaches {path}"
    for step, (one, many) in enumerate(zip(told, sharded_told, strict=True)):
        same(many, one, f"step {step}", rtol=1e-5, atol=1e-7)  # some are float32
        assert many["scalars"]["loss"] == pytest.approx(one["scalars"]["loss"], rel=1e-9)
    same(sharded_state, state, "at the end", rtol=1e-7, atol=1e-9)


def same(tree, expected, when: str, **tolerance) -> None:
    leaves, others = (jax.tree_util.tree_leaves_with_path(t) for t in (expected, tree))
    for (path, value), (other_path, other) in zip(leaves, others, strict=True):
        assert path == other_path
        np.testing.assert_allclose(other, value, err_msg=f"{when}, {jax.tree_util.keystr(path)}", **tolerance)


def curve(router: str, mesh_config: MeshConfig | None):
    """([what each of twenty steps reports], the state after them)."""
    config = settings(router, layers="2*moe" if router == "recurrent" else "1*moe", dtype="float64")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation=2))
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh_config is None else make_mesh(mesh_config)
    trainer = Trainer(config, mesh, config.train.objective.make())
    state = trainer.init_state()
    wide = lambda x, where: jax.device_put(x.astype(jnp.float64) if x.dtype == jnp.float32 else x, where)
    for group in ("trainable", "frozen", "buffers", "opt"):
        state[group] = jax.tree.map(wide, state[group], trainer.state_shardings[group])
    data = dict(batch(16, 16))
    # where tokens compete, equal tokens in equal contexts tie and rounding picks among them: no skew there
    common = np.random.default_rng(7).random(data["tokens"].shape) < (0 if router in COMPETING else 0.7)
    data["tokens"] = np.where(common, 65, data["tokens"])
    told = []
    for step in range(20):
        state, stats = trainer.train_step(state, data, np.float32(step / 20))
        told.append(jax.device_get(stats))
    return told, jax.device_get(state)


@pytest.mark.parametrize("mesh", ["expert", "mixed"])
def test_nan_in_padding_leaks_nowhere_through_the_dispatcher(mesh):
    """Poisoned rows of tokens that go nowhere change neither value nor gradient on a mesh."""
    from moe_zoo.core import param as P
    from moe_zoo.core.context import RoutingContext
    from moe_zoo.core.decision import TokenChoice
    from moe_zoo.dispatch.dropless import Dropless
    from moe_zoo.experts.feed_forward import FeedForward
    from moe_zoo.layers.mlp import FeedForwardConfig

    E, T, D = 8, 32, 16
    bank = P.materialize(
        FeedForward(FeedForwardConfig(), num_experts=E, hidden_size=D, intermediate_size=8, out_scale=1.0), 0
    )
    rng = np.random.default_rng(0)
    x = rng.standard_normal((T, D)).astype(np.float32)
    x[::3] = np.nan
    experts = rng.integers(0, 2, (T, 2))  # skew: two of eight experts do all the work
    experts[:, 1] = 1 - experts[:, 0]
    experts[::3] = E
    choice = TokenChoice(jnp.asarray(experts, jnp.int32), jnp.ones((T, 2)) * (experts < E), E)

    def loss(x, bank, mesh):
        ctx = RoutingContext(batch=8, seq=T // 8, mesh=mesh)
        return jnp.sin(Dropless()(x, choice, bank, ctx)[0]).sum()

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    a, b = grad(x, bank, None), grad(x, bank, make_mesh(MESHES[mesh]))
    for one, many in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert bool(jnp.isfinite(many).all())
        np.testing.assert_allclose(many, one, atol=1e-5)
