"""SAME: its rules by dense matrices, statistics over chunks and tasks, a run after a run on one device or four."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_adapter_entries import CTX, changed, make, run
from test_training import BASE

from moe_zoo.adapters import steering
from moe_zoo.adapters.same import clipped_gain, local_gain, preconditioned, principal, turned_down
from moe_zoo.core import param as P
from moe_zoo.core.aux import merge_stats
from moe_zoo.core.schema import build, to_dict
from moe_zoo.models import Decoder, ModelConfig
from moe_zoo.sharding import MeshConfig, make_mesh
from moe_zoo.train.config import load_config
from moe_zoo.train.step import Trainer

SAME = {"name": "same", "num_experts": 3, "target_modules": ["mixer.*"]}
RNG = np.random.default_rng(0)
D, K = 8, 3


def moment(seed=0, D=D):
    """A second moment with directions that stand out."""
    x = np.random.default_rng(seed).standard_normal((40, D)) * 2.0 ** -np.arange(D)
    return x.T @ x / 40


def fresh(adapter, **values):
    """Buffers as a first run begins with them."""
    start = {n: np.zeros(v.get_value().shape) for n, v in P.flat(adapter).items() if isinstance(v, P.Buffer)}
    return changed(adapter, **(start | {"router_gain": np.ones_like(start["router_gain"])} | values))


# -- the rules --------------------------------------------------------------------------------------------------------


def test_principal_directions_are_the_fewest_that_hold_the_energy():
    basis, _ = np.linalg.qr(RNG.standard_normal((4, 4)))
    values = np.array([4.0, 3.0, 2.0, 1.0])  # squares 16, 25, 29, 30
    found = lambda energy, K=4: principal(jnp.float32(basis * values @ basis.T), energy, K)
    np.testing.assert_allclose(found(0.9)[0], values, rtol=1e-5)
    np.testing.assert_allclose(np.abs(basis.T @ found(0.9)[1]), np.eye(4), atol=1e-3)
    for energy, kept in ((0.5, 1), (0.8, 2), (0.9, 3), (0.99, 4), (1.0, 4)):
        assert np.asarray(found(energy)[2]).tolist() == [i < kept for i in range(4)]
    assert found(0.99, K=2)[1].shape == (4, 2)
    assert not np.asarray(principal(jnp.zeros((4, 4)), 0.9, 4)[2]).any()


def test_gains_by_hand():
    values = jnp.array([8.0, 4.0, 3.0, 1.0])
    np.testing.assert_allclose(local_gain(values, 3), [1, 4 / 6, 3 / 5, 1 / (8 / 3)], rtol=1e-6)
    np.testing.assert_allclose(local_gain(values, 1), np.ones(4))
    assert np.asarray(local_gain(jnp.zeros(3), 3)).tolist() == [1, 1, 1]
    # of singular values 4, 2, 1 (and one not kept): inverses of 4, 3, 7/3, over the largest
    kept = jnp.array([True, True, True, False])
    code = clipped_gain(jnp.array([16.0, 4.0, 1.0, 0.1]), 3, kept)
    np.testing.assert_allclose(code[:3], [0.8, 0.8, 1.0], rtol=1e-5)
    np.testing.assert_allclose(clipped_gain(jnp.array([1.21, 1.0]), 1, kept[:2]), [1 / 1.1, 1], rtol=1e-5)


def test_the_router_is_turned_down_within_the_directions_and_untouched_across():
    values, basis, _ = principal(jnp.float32(moment()), 1.0, K)
    gradient = RNG.standard_normal((D, 5))
    V = np.asarray(basis, np.float64)
    gain = np.array([1.0, 0.5, 0.25])
    expected = V @ np.diag(gain) @ V.T @ gradient + (np.eye(D) - V @ V.T) @ gradient
    np.testing.assert_allclose(turned_down(jnp.float32(gradient), basis, jnp.float32(gain)), expected, atol=1e-5)
    np.testing.assert_array_equal(turned_down(jnp.float32(gradient), basis, jnp.ones(K)), np.float32(gradient))


def test_experts_are_preconditioned_by_the_damped_inverse():
    basis, _ = np.linalg.qr(RNG.standard_normal((D, K)))
    values, mu, a = np.array([3.0, 0.5, 0.0]), 0.9, RNG.standard_normal((2, 4, D))
    dense = np.linalg.inv(basis * values @ basis.T + mu * np.eye(D))
    got = preconditioned(jnp.float32(a), jnp.float32(basis), jnp.float32(values), mu)
    np.testing.assert_allclose(got, a @ dense, atol=1e-5)
    large = preconditioned(jnp.float32(a), jnp.float32(basis), jnp.float32(values), 1e6)
    np.testing.assert_allclose(1e6 * large, a, rtol=1e-4, atol=1e-5)


def test_a_preconditioned_step_of_equal_size_changes_old_outputs_less():
    C = moment(1)
    values, basis, kept = principal(jnp.float32(C), 0.999, D)
    drift = lambda a: np.trace(a @ C @ a.T) / (a**2).sum()
    for seed in range(5):
        raw = np.random.default_rng(seed).standard_normal((4, D))
        step = preconditioned(jnp.float32(raw)[None], basis, jnp.where(kept, values, 0), 0.1)[0]
        assert drift(np.asarray(step, np.float64)) < 0.7 * drift(raw)


def test_rules_act_where_they_are_asked_to_and_experts_from_the_second_task_on():
    adapter = fresh(make(**SAME)[0], past_basis=np.eye(8), past_values=np.arange(8) + 1.0)
    values = {"a": jnp.ones((3, 2, 8)), "b": jnp.ones((3, 2, 6)), "router": jnp.ones((8, 3))}
    assert adapter.steered(values, "gradients") == {}
    first = adapter.steered(values, "updates")
    assert first.keys() == {"a", "router"}
    for name, value in first.items():
        np.testing.assert_array_equal(value, values[name])
    second = changed(adapter, past_tokens=7.0).steered(values, "updates")
    np.testing.assert_allclose(second["a"][0, 0], 1 / (np.arange(8) + 1.9), rtol=1e-5)
    other = make(**SAME, where="gradients", gain="none", curvature=None)[0]
    assert other.steered(values, "gradients") == {} and other.refresh_every == 0


# -- statistics -------------------------------------------------------------------------------------------------------


def test_means_over_chunks_are_those_of_all_tokens_and_tasks_weigh_by_theirs():
    adapter, x, y, w = make(**SAME, freeze_below=-1.0)
    adapter = fresh(adapter)
    start, tokens = adapter, []
    valid = np.array([True, True, True, True, True, False])
    for seed in range(3):
        chunk = jnp.float32(np.random.default_rng(seed).standard_normal(x.shape))
        _, aux = run(adapter, chunk, y, w, CTX.replace(valid=valid))
        tokens.append((np.asarray(chunk)[:5], aux))
        adapter = changed(adapter, **adapter.after_step(aux.stats))
    seen = np.concatenate([chunk for chunk, _ in tokens]).astype(np.float64)
    probs = np.exp(seen @ np.asarray(adapter.router[...]))
    probs /= probs.sum(1, keepdims=True)

    def same_means(p, task, seen, probs):
        np.testing.assert_allclose(p[f"{task}_tokens"], len(seen), rtol=1e-5)
        np.testing.assert_allclose(p[f"{task}_moment"], seen.T @ seen / len(seen), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(p[f"{task}_use"], probs.mean(0), rtol=1e-4)
        np.testing.assert_allclose(p[f"{task}_energy"], (probs * (seen**2).sum(1)[:, None]).mean(0), rtol=1e-4)

    same_means(P.arrays(adapter), "this", seen, probs)
    # accumulated or over devices: statistics add up
    merged = merge_stats(tokens[0][1].stats, tokens[1][1].stats)
    same_means(P.arrays(changed(start, **start.after_step(merged))), "this", seen[:10], probs[:10])
    second = changed(adapter, **adapter.begun())
    same_means(P.arrays(second), "past", seen, probs)
    assert not any(np.asarray(P.arrays(second)[f"this_{name}"]).any() for name in ("tokens", "moment", "use", "energy"))
    C = seen.T @ seen / len(seen)
    kept = np.asarray(second.past_values[...]) > 0
    np.testing.assert_allclose(second.past_values[...][kept], np.linalg.eigvalsh(C)[::-1][kept], rtol=1e-4)
    # a task of one chunk more
    _, aux = run(second, x, y, w, CTX.replace(valid=valid))
    third = changed(second, **second.after_step(aux.stats))
    third = changed(third, **third.begun())
    seen = np.concatenate([seen, np.asarray(x)[:5]])
    np.testing.assert_allclose(third.past_moment[...], seen.T @ seen / 20, rtol=1e-4, atol=1e-5)
    assert third.past_tokens[...] == pytest.approx(20, rel=1e-5)
    # what the router's rule knows is this task and those before it
    halfway = changed(second, **second.after_step(aux.stats))
    values, _, kept = principal(third.past_moment[...], 0.9, 8)
    expected = np.where(kept, local_gain(values, 3), 1)
    np.testing.assert_allclose(halfway.refreshed()["router_gain"], expected, rtol=1e-3, atol=1e-4)


# -- freezing ---------------------------------------------------------------------------------------------------------


def test_experts_that_the_task_does_not_use_or_old_ones_need_wait():
    adapter, x, y, w = make(**SAME)
    seen = lambda use, energy, made=adapter, tokens=9.0: fresh(
        made, this_tokens=tokens, this_use=use, past_energy=energy
    ).frozen()
    frozen = lambda *how, **more: np.asarray(seen(*how, **more)).tolist()
    # U 1, 1/2, 0; F 0, 1/4, 1: scores 1, 1/4, -1
    assert frozen([0.6, 0.4, 0.2], [1, 2, 5]) == [False, False, True]
    assert frozen([0.6, 0.4, 0.2], [1, 3, 5]) == [False, True, True]
    assert frozen([0.6, 0.4, 0.2], [0, 0, 0]) == [False, False, True]  # the first task: by use alone
    assert frozen([0.6, 0.4, 0.2], [1, 3, 5], tokens=0.0) == [False] * 3
    assert frozen([0.4, 0.5, 0.6], [4, 5, 6]) == [False, True, True]  # all scores 0: one is left
    assert frozen([0.6, 0.4, 0.2], [1, 2, 5], make(**SAME, freeze_below=-1.0)[0]) == [False] * 3
    waits = fresh(adapter, this_tokens=9.0, this_use=[0.6, 0.4, 0.2], past_energy=[1, 2, 5])
    for train, mass in ((True, [True, True, False]), (False, None)):
        _, aux = run(waits, x, y, w, CTX.replace(train=train))
        load = np.asarray(aux.stats["load"].total)
        np.testing.assert_allclose(load.sum(), 6, rtol=1e-5)
        assert mass is None or (load > 0).tolist() == mass
    assert float(aux.stats["experts_per_token"].value()) == 2 and load[2] > 0
    slope = jax.grad(lambda b: run_out(waits, b, x, y, w).sum())(waits.b[...])
    assert np.abs(slope[:2]).max() > 0 and not np.asarray(slope[2]).any()


def run_out(adapter, b, x, y, w):
    return P.replace(adapter, P.arrays(adapter) | {"b": b})(x, y, w, CTX)[0]


def test_one_expert_with_all_of_the_gate_is_lora():
    adapter, x, y, w = make(**SAME)
    sure = fresh(adapter, router=np.zeros((8, 3)), this_tokens=1.0, this_use=[0, 0, 1], past_energy=[1, 1, 0])
    lora = changed(make(name="lora")[0], a=adapter.a[...][2:], b=adapter.b[...][2:])
    np.testing.assert_allclose(run(sure, x, y, w)[0], run(lora, x, y, w)[0], rtol=1e-4, atol=1e-4)


def test_held_numbers_keep_their_moments_under_weight_decay():
    tx = optax.adamw(0.1, weight_decay=0.5)
    params = {"s.a": jnp.ones((2, 3, 1, 2)), "s.router": jnp.ones((2, 4, 3))}
    masks = {"s.a": jnp.zeros((2, 3, 1, 1), bool).at[0, 1].set(True)}
    before = tx.init(params)
    _, before = tx.update(jax.tree.map(jnp.ones_like, params), before, params)
    updates, after = tx.update(jax.tree.map(jnp.ones_like, params), before, params)
    moved = steering.kept(masks, optax.apply_updates(params, updates), params)
    state = steering.kept(masks, after, before)
    for old, new in ((params["s.a"], moved["s.a"]), (before[0].mu["s.a"], state[0].mu["s.a"])):
        assert (np.asarray(new == old).all(-1).ravel() == np.asarray(masks["s.a"]).ravel()).all()
    assert (np.asarray(moved["s.router"]) != 1).all() and int(state[0].count) == 2
    np.testing.assert_array_equal(state[0].nu["s.a"][0, 1], before[0].nu["s.a"][0, 1])


# -- runs -------------------------------------------------------------------------------------------------------------


def batch_of(seed):
    ids = np.random.default_rng(seed).integers(0, 256, (4, 9)).astype(np.int32)
    return {
        "tokens": ids[:, :-1], "targets": ids[:, 1:], "segment_ids": np.ones((4, 8), np.int32),
        "positions": np.tile(np.arange(8, dtype=np.int32), (4, 1)), "domain": np.zeros((4, 8), np.int32),
        "loss_mask": np.ones((4, 8), bool),
    }  # fmt: skip


def numbers(state):
    """Values by path, and moments, as they are before the state is given away."""
    values = {n: np.array(a) for part in ("trainable", "frozen", "buffers") for n, a in state[part].items()}
    return values, [jax.tree.map(np.array, getattr(state["opt"][0], name)) for name in ("mu", "nu")]


def two_tasks(mesh):
    """What there is after two steps of a first task, as a second begins, and after each of two steps of that."""
    settings = to_dict(build(ModelConfig, BASE | {"layers": "2*dense"}, "model"))
    base = P.arrays(P.materialize(Decoder(build(ModelConfig, settings, "model")), 0))
    changes = [("model.adapters.target_modules", "('mixer.q', 'mixer.o')"), ("optim.weight_decay", "0.1")]
    changes += [("data.seq_len", "8"), ("data.batch_size", "4")]
    config = load_config("lora/same:tiny", changes, {"model": settings})
    trainer = Trainer(config, mesh, config.train.objective.make())
    state, found = trainer.init_state(given=base), []
    for seed in range(4):
        if seed == 2:
            found.append(numbers(state))
            state = trainer.init_state(given=found[0][0])
            found.append(numbers(state))
        state, stats = trainer.train_step(state, batch_of(seed), np.float32(0))
        assert not any("/" in name for layer in stats["layers"].values() for name in layer)
        if seed >= 2:
            found.append(numbers(state))
    return trainer, found


@pytest.mark.slow  # two train steps are compiled, one of them for four devices
def test_a_run_after_a_run_finds_its_statistics_on_one_device_or_four():
    meshes = make_mesh(devices=jax.devices()[:1]), make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    (trainer, found), (_, others) = map(two_tasks, meshes)
    (after, _), (start, _), (one, old), (two, new) = found
    prefix = "segments.0.blocks.0.adapters.mixer.q."
    np.testing.assert_allclose(after[prefix + "this_tokens"], [64, 64], rtol=1e-5)
    np.testing.assert_allclose(start[prefix + "past_moment"], after[prefix + "this_moment"], rtol=1e-5)
    np.testing.assert_array_equal(start[prefix + "a"], after[prefix + "a"])
    assert not start[prefix + "this_moment"].any() and start[prefix + "past_values"].any()
    assert one[prefix + "router_basis"].any() and (one[prefix + "router_basis"] == two[prefix + "router_basis"]).all()
    np.testing.assert_array_equal(two[prefix + "past_moment"], start[prefix + "past_moment"])
    # what waits in the last step by what the one before has left
    masks = steering.held(P.replace(trainer.abstract, {n: jnp.asarray(a) for n, a in one.items()}))
    assert masks.keys() == {f"segments.0.blocks.0.adapters.mixer.{w}.{n}" for w in "qo" for n in "ab"}
    for path, mask in masks.items():
        mask_LE = np.asarray(mask)[..., 0, 0]
        assert mask_LE.any() and not mask_LE.all(1).any()
        for before, then in ((one[path], two[path]), *((b[path], t[path]) for b, t in zip(old, new))):
            stays = (before == then).all((-1, -2))
            np.testing.assert_array_equal(stays, mask_LE, err_msg=path)
    for (values, _), (same, _) in zip(found, others):
        for name, value in values.items():
            if "basis" not in name:  # an eigenvector's sign is anyone's choice
                np.testing.assert_allclose(same[name], value, rtol=2e-3, atol=2e-4, err_msg=name)
