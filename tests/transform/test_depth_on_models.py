"""Selectors put on a finished model: what is counted as answered, what labels teach, budgets, and LoRA beside them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import tiny_config

from moe_zoo.checkpoints import CheckpointError
from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.data import load_tokenizer
from moe_zoo.inference import Loaded, load
from moe_zoo.inference.saving import save, save_hf
from moe_zoo.models import Decoder
from moe_zoo.sharding import make_mesh, sharding_of
from moe_zoo.train.config import load_config
from moe_zoo.train.step import Trainer, partition
from moe_zoo.transform import Questions, add_adapters, add_selectors, answered, label_paths, set_budget, teach_paths
from moe_zoo.transform.depth import _seen

L = 3
PAIRS = [(f"{a}{b}+{a}=", f"{b}") for a in range(2, 6) for b in range(8)]


def same_base(one: Loaded, other: Loaded) -> bool:
    weights = lambda m: {n: np.asarray(a) for n, a in P.arrays(m.model).items() if ".selector." not in n}
    one, other = weights(one), weights(other)
    return all((one[n] == other[n]).all() for n in one | other)


@pytest.fixture(scope="module")
def base() -> Loaded:
    config, mesh = tiny_config(vocab_size=264, layers=f"{L}*dense", losses={}), make_mesh(devices=jax.devices()[:1])
    put = lambda var, path, x: jax.device_put(x, sharding_of(mesh, var.logical_axes, x.shape, path))
    model = P.materialize(Decoder(config), 0, put)
    large = {n: a * 30 if n.startswith("embed.") else a for n, a in P.arrays(model).items()}  # as a trained one's are
    return Loaded(P.replace(model, large), config, load_tokenizer("bytes"))


@pytest.fixture(scope="module")
def routed(base) -> Loaded:
    return add_selectors(base, {"name": "dr_llm", "windows": 3, "router_hidden": 16}, seed=1)


def with_own_answers(loaded: Loaded) -> Questions:
    """Whose answers are what the model itself finds likeliest."""
    asked = Questions.of(loaded, PAIRS)
    run = jax.jit(lambda tokens, valid, prompt: loaded.model(tokens, valid=valid, prompt=prompt)[0].argmax(-1))
    return dataclasses.replace(asked, targets=np.asarray(run(asked.tokens, asked.valid, asked.prompt)))


def test_selectors_are_put_on_once_and_leave_the_weights(base, routed):
    assert same_base(base, routed) and not base.model.selects
    with pytest.raises(ConfigError, match="selectors already, DrLlm"):
        add_selectors(routed, "first")
    with pytest.raises(ConfigError, match="'mod' is trained with its model"):
        add_selectors(base, "mod")
    with pytest.raises(ConfigError, match="'dr_llm'.*got 'first'"):
        set_budget(add_selectors(base, "first"), 0.0)
    with pytest.raises(ValueError, match="learns from paths"):
        jax.eval_shape(lambda: routed.model(jnp.zeros((1, 4), jnp.int32), train=True))


def test_what_has_selectors_is_saved_and_opened_as_it_is(routed, tmp_path):
    save(routed, tmp_path / "routed")
    again = load(tmp_path / "routed")
    assert again.config == routed.config and again.config.retrofit == "dr_llm"
    kept, found = P.arrays(routed.model), P.arrays(again.model)
    assert kept.keys() == found.keys() and all((np.asarray(kept[n]) == np.asarray(found[n])).all() for n in kept)
    with pytest.raises(CheckpointError, match="no selectors of depth"):
        save_hf(routed, tmp_path / "published")


def test_answered_is_every_token_of_the_answer_and_its_end_and_nothing_else(routed):
    asked = with_own_answers(routed)
    row = [routed.tokenizer.bos_id, *routed.tokenizer.encode("20+2="), *routed.tokenizer.encode("0")]
    assert asked.tokens[0, :7].tolist() == row and asked.prompt[0].sum() == 6 and asked.valid[0].sum() == 7
    assert Questions.of(routed, PAIRS).targets[0, :7].tolist() == [*row[1:], routed.tokenizer.eos_id]
    np.testing.assert_array_equal(np.flatnonzero(asked.asked[0]), [5, 6])
    right, times = answered(routed, asked, batch_size=32)
    assert right.all() and times.shape == (len(asked), L) and len(np.unique(times)) > 1
    other = asked.targets.copy()
    other[0, 4] += 1  # within the question
    other[1, 6] += 1
    other[2, 5] += 1
    right, _ = answered(routed, dataclasses.replace(asked, targets=other), batch_size=32)
    np.testing.assert_array_equal(np.flatnonzero(~right), [1, 2])


def test_labels_are_found_and_taught_and_budgets_kept(base, routed):
    asked = with_own_answers(base)
    labels, found = label_paths(routed, asked, batch_size=32)
    right, times = answered(routed, asked, labels, batch_size=32)
    assert found.all() and right.all() and (times == labels).all() and (labels.sum(1) < L).any()
    # what can be read off the last digit of the question
    labels = np.ones((len(asked), L), np.int8)
    labels[:, 0], labels[:, 1] = np.arange(len(asked)) % 8 > 3, 1 + (np.arange(len(asked)) // 8 > 1)
    taught, losses = teach_paths(
        routed, asked, labels, epochs=60, batch_size=16, learning_rate=2e-2, warmup_steps=5, seed=2
    )
    assert losses[-1] < 0.2 * losses[0] and same_base(base, taught)
    assert taught.config.depth.config.class_counts == (16, 64, 16)
    _, times = answered(taught, asked, batch_size=32)
    assert (times == labels).mean() > 0.9
    # what it learned from is what the model reads along the path
    inputs = {"depth": jnp.asarray(labels.T, jnp.int32)}
    follow = jax.jit(lambda tokens, **more: taught.model(tokens, inputs=inputs, train=True, **more)[1].losses)
    of_model = follow(asked.tokens, valid=asked.valid, prompt=asked.prompt)["depth_labels"]
    ((path, block, _),) = taught.model.blocks()
    seen = _seen(taught, asked, labels, 32)[path]
    of_windows = jax.jit(jax.vmap(lambda selector, *read: selector.loss(*read)[0]))(block.selector, *seen)
    assert float(of_model) == pytest.approx(float(of_windows.sum()), rel=1e-4)
    twice = set_budget(taught, 1.0)
    assert twice.config.depth.config.budget == 1.0 and same_base(twice, taught)
    assert P.arrays(twice.model).keys() == P.arrays(taught.model).keys()


def test_first_trains_gates_alone_and_then_lora_alone_with_hard_ones(base):
    """Two phases: gates beside the base; adapters beside base and gates, which decide as they will later."""
    gated = add_selectors(base, {"name": "first", "init_bias": 0.0, "init_std": 5.0}, seed=3)
    adapted = add_adapters(gated, {"name": "lora", "r": 2})
    assert {n.rpartition(".")[2] for n in partition(gated.model, ()).trainable} == {"kernel", "bias"}
    trained = partition(adapted.model, ()).trainable
    assert trained and all(".adapters." in name for name in trained)
    asked = Questions.of(base, PAIRS)
    run = lambda loaded, train: jax.jit(
        lambda tokens: loaded.model(tokens, valid=asked.valid, prompt=asked.prompt, train=train, record=True)[::1]
    )(asked.tokens)
    logits, aux, _ = run(adapted, True)
    hard, told, _ = run(gated, False)
    np.testing.assert_allclose(logits, hard, atol=1e-5)
    assert "depth_gates" not in aux.losses
    times = next(iter(told.layers.values()))[1].terms["depth_through"]
    assert 0 < times[:, asked.valid].mean() < 1


def test_the_config_of_first_trains_on_a_given_model_and_leaves_it_as_it_is():
    config = load_config("depth/first:tiny")
    trainer = Trainer(config, make_mesh(devices=jax.devices()[:1]), config.train.objective.make())
    state = trainer.init_state()
    names = set(state["trainable"])
    assert names and all(".selector." in name for name in names) and not state["buffers"]
    before = jax.tree.map(np.array, {group: state[group] for group in ("trainable", "frozen")})
    Bx, S = config.data.batch_size, config.data.seq_len
    ids = np.random.default_rng(0).integers(0, 256, (Bx, S + 1)).astype(np.int32)
    batch = {
        "tokens": ids[:, :-1], "targets": ids[:, 1:], "segment_ids": np.ones((Bx, S), np.int32),
        "positions": np.tile(np.arange(S, dtype=np.int32), (Bx, 1)), "domain": np.zeros((Bx, S), np.int32),
        "loss_mask": np.ones((Bx, S), bool),
    }  # fmt: skip
    shares = []
    for _ in range(8):
        state, stats = trainer.train_step(state, batch, np.float32(0))
        shares.append(float(next(iter(stats["layers"].values()))["depth_gate"].value().mean()))
    assert shares[-1] < shares[0]  # what there is to predict is noise, and layers cost
    jax.tree.map(np.testing.assert_array_equal, before["frozen"], dict(state["frozen"]))
    assert all((np.asarray(state["trainable"][n]) != before["trainable"][n]).any() for n in names)
