"""Classifiers through the one loop: resumed bit for bit, scored as by hand, equal on eight devices; their data."""

import importlib.util
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from moe_zoo.cli.evaluate import evaluate
from moe_zoo.core.registry import ConfigError
from moe_zoo.data.errors import DataError
from moe_zoo.data.images import ClutteredConfig, ClutteredDigits, Digits, DigitsConfig, resized
from moe_zoo.data.labelled import Labelled, labelled_batches, labelled_iterator, split_labelled
from moe_zoo.inference import load, load_classifier
from moe_zoo.models import make_model
from moe_zoo.sharding import MeshConfig, make_mesh
from moe_zoo.train.classification import Classification, ClassificationConfig
from moe_zoo.train.config import load_config
from moe_zoo.train.log_writers import read_metrics
from moe_zoo.train.loop import train
from moe_zoo.train.report import make_report
from moe_zoo.train.step import Trainer

FILES = sorted((Path(__file__).parents[2] / "configs" / "vision").glob("*.py"))
OVERRIDES = [
    ("train.steps", "6"),
    ("checkpoint.every", "3"),
    ("log.every", "1"),
    ("log.eval_every", "3"),
    ("mesh.data", "8"),
]


@pytest.fixture(scope="module")
def digits():
    return Digits(DigitsConfig()).load()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_config_says_what_it_is_for_and_its_presets_are_valid(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for word in ("Command:", f"configs/vision/{path.name}", "Cost:", "Reaches:", "Presets:"):
        assert word in module.__doc__, word
    for preset in module.PRESETS:
        assert load_config(f"{path}:{preset}").data.batches == "labelled"


def test_tiny_trains_through_the_loop_and_is_scored_as_by_hand(tmp_path, capsys):
    """On eight devices, stopped and gone on with; the report's figures from the logits alone."""
    config = load_config("vision/biformer:tiny", OVERRIDES)
    assert not train(config, tmp_path, stop_at=3)["finished"]
    run = train(config, tmp_path)
    assert run["finished"] and run["step"] == 6
    report = make_report(config, tmp_path, run)
    test = run["parts"]["test"]
    loaded = load_classifier(tmp_path)
    logits = np.asarray(loaded(**test.fields)[0], np.float64)
    nats = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(test)), test.labels]
    right = logits.argmax(-1) == test.labels
    assert report["accuracy"] == pytest.approx(right.mean()) and report["examples"] == len(test)
    assert report["bits"] == pytest.approx(nats.mean() / math.log(2), rel=1e-4)
    assert report["accuracy_by_class"]["3"] == pytest.approx(right[test.labels == 3].mean())
    assert Path(report["pictures"]["accuracy"]).stat().st_size > 1000
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [3, 6]
    assert lines[0]["loss"] == pytest.approx(math.log(10), abs=0.6)
    capsys.readouterr()
    evaluate([f"--workdir={tmp_path}", "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"] == pytest.approx(report["accuracy"])
    with pytest.raises(ValueError, match="no model of text"):
        load(tmp_path)


def test_batches_go_on_where_they_stopped_and_every_epoch_has_every_example_once(digits):
    few = digits.select(np.arange(24))
    make = lambda: labelled_iterator(few, batch_size=8, seed=3)
    data, seen = make(), []
    for step in range(6):
        if step == 2:
            position = data.get_state()
        seen.append(next(data)["images"])
    for epoch in (seen[:3], seen[3:]):
        found = np.concatenate(epoch).reshape(24, -1)
        assert len(np.unique(found, axis=0)) == 24
    assert any((a != b).any() for a, b in zip(seen[:3], seen[3:]))
    again = make()
    again.set_state(position)
    for expected in seen[2:]:
        np.testing.assert_array_equal(next(again)["images"], expected)
    some = labelled_iterator(few, batch_size=8, seed=3, rows=np.array([1, 6]))
    np.testing.assert_array_equal(next(some)["images"], seen[0][[1, 6]])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_learns_and_a_sharded_step_equals_one_device(path):
    """A step of plain gradients on all mesh axes moves every parameter as one device does; and one batch is learned."""
    plain = {"optim.name": "sgd", "optim.warmup_steps": "0", "optim.learning_rate": "0.1", "optim.clip_norm": "none"}
    config = load_config(f"{path}:tiny", list(plain.items()))
    data = config.data.source.make().load()
    batch = data.rows(np.arange(config.data.batch_size))
    make = lambda mesh: Trainer(config, mesh, config.train.objective.make())
    one, many = make(make_mesh(devices=jax.devices()[:1])), make(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    state, begin = one.init_state(), jax.device_get(one.init_state())
    losses = []
    for step in range(20):
        state, stats = one.train_step(state, batch, np.float32(0))
        losses.append(float(stats["scalars"]["loss"]))
        if step == 0:
            moved, told = jax.device_get((state, stats))
    sharded = jax.device_put(begin, many.state_shardings)
    sharded, sharded_told = jax.device_get(many.train_step(sharded, batch, np.float32(0)))
    for value, other in zip(jax.tree.leaves(told), jax.tree.leaves(sharded_told), strict=True):
        np.testing.assert_allclose(other, value, rtol=5e-5, atol=1e-6)
    for name, value in moved["trainable"].items():
        step, other = value - begin["trainable"][name], sharded["trainable"][name] - begin["trainable"][name]
        np.testing.assert_allclose(other, step, atol=1e-4 * max(np.abs(step).max(), 1e-4), err_msg=name)
    assert losses[-1] < losses[0] - 0.3, losses


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_computes_in_bfloat16_and_answers_in_float32(path):
    config = load_config(f"{path}:tiny", [("model.dtype", "bfloat16")])
    graphdef, state = nnx.split(make_model(config.model))
    images = jax.ShapeDtypeStruct((4, 8, 8, 1), np.uint8)
    traced = jax.make_jaxpr(lambda state, images: nnx.merge(graphdef, state)({"images": images})[0])(state, images)
    assert traced.out_avals[0].dtype == np.float32 and traced.out_avals[0].shape == (4, 10)
    products = [str(e) for e in traced.eqns if e.primitive.name == "conv_general_dilated"]
    assert len(products) >= 2 and all("bf16" in product for product in products)


def test_objective_is_the_cross_entropy_of_labels_whatever_the_model_sees():
    """With smoothing, against the formula; rows that do not count do not, and the model never sees the labels."""
    logits = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    seen = []

    class Aux:
        stats = {}

        def total_loss(self):
            return 0.25

    def model(fields, **how):
        seen.append(fields)
        return logits, Aux()

    objective = Classification(ClassificationConfig(label_smoothing=0.1))
    batch = {"tokens": np.zeros((4, 7)), "labels": np.array([0, 2, 1, 1]), "loss_mask": np.array([1, 1, 1, 0], bool)}
    loss, stats = objective.loss(model, objective.weighted(batch), {}, step=0, key=None, fraction=0.5)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = 0.9 * np.eye(3)[batch["labels"]] + 0.1 / 3
    assert loss == pytest.approx(-(target * log_p).sum(-1)[:3].mean() + 0.5 * 0.25, rel=1e-5)
    right = (logits.argmax(-1) == batch["labels"])[:3].mean()
    assert stats["scalars"]["accuracy"].value() == pytest.approx(right)
    assert seen[0].keys() == {"tokens"}


def test_split_keeps_groups_together_and_shares_of_classes_and_is_fixed(digits):
    doubled = digits.select(np.repeat(np.arange(len(digits)), 2))
    parts = split_labelled(doubled, (0.7, 0.1, 0.2), 0)
    assert sum(map(len, parts.values())) == 2 * len(digits) == 3594
    groups = [set(part.groups) for part in parts.values()]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    for part, share in zip(parts.values(), (0.7, 0.1, 0.2)):
        of_class = np.bincount(part.labels) / np.bincount(doubled.labels)
        assert np.abs(of_class - share).max() < 0.01
    assert parts["test"].fingerprint == split_labelled(doubled, (0.7, 0.1, 0.2), 0)["test"].fingerprint
    assert parts["test"].fingerprint != split_labelled(doubled, (0.7, 0.1, 0.2), 1)["test"].fingerprint
    with pytest.raises(DataError, match="add up to 1"):
        split_labelled(digits, (0.7, 0.1, 0.1), 0)
    with pytest.raises(DataError, match="expected as many"):
        Labelled({"images": np.zeros((3, 1))}, np.zeros(2, int), ("a",), np.arange(2))


def test_every_example_is_scored_once(digits):
    few = digits.select(np.arange(21))
    batches = list(labelled_batches(few, batch_size=8))
    assert [len(batch["labels"]) for batch in batches] == [8, 8, 8]
    kept = np.concatenate([batch["images"][batch["loss_mask"]] for batch in batches])
    np.testing.assert_array_equal(kept, few.fields["images"])
    assert not batches[-1]["images"][~batches[-1]["loss_mask"]].any()


def test_cluttered_digits_are_digits_on_photographs_and_follow_from_the_seed(digits):
    settings = dict(canvas=24, smallest=8, largest=16, copies=2)
    made = ClutteredDigits(ClutteredConfig(**settings)).load()
    images, ink = made.fields["images"][..., 0], made.fields["foreground"]
    assert images.shape == ink.shape == (3594, 24, 24) and images.dtype == np.uint8
    assert (made.labels.reshape(-1, 2) == digits.labels[:, None]).all() and (made.groups == np.arange(3594) // 2).all()
    rows, columns = ink.any(2).sum(1), ink.any(1).sum(1)
    assert 5 <= rows.min() and max(rows.max(), columns.max()) <= 16 and len(set(rows)) > 6  # of any scale, and whole
    assert (
        images[ink].mean() > 2 * images[~ink].mean() and images[~ink].std() > 20
    )  # ink is bright, clutter is not flat
    again = ClutteredDigits(ClutteredConfig(**settings)).load()
    assert (
        again.fingerprint == made.fingerprint != ClutteredDigits(ClutteredConfig(**settings, seed=1)).load().fingerprint
    )
    ramp = np.arange(8.0)[:, None] + np.zeros(8)
    np.testing.assert_allclose(resized(ramp, 16)[1:-1, 0], np.arange(14) / 2 + 0.25)
    with pytest.raises(ConfigError, match="at most 1"):
        ClutteredConfig(clutter=2.0).validate("data.source")


@pytest.mark.parametrize(
    "override, why",
    [
        (("model.image_size", "16"), "the data has images of"),
        (("train.objective.name", "next_token"), "learns from text"),
        (("model.name", "biforme"), "did you mean 'biformer'"),
        (("data.source.name", "digit"), "did you mean 'digits'"),
        (("data.source.copies", "2"), "unknown key"),
        (("model.hidden_sizes", "[1,2]"), "hidden_sizes.*the first one even"),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_mistakes_are_named_before_anything_compiles(override, why, tmp_path):
    with pytest.raises(ConfigError, match=why):
        train(load_config("vision/biformer:tiny", [override]), tmp_path / "run")
