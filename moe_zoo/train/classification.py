"""Examples with a class each: cross-entropy of the label, scored by accuracy and bits.

A model of this kind (`models/classifier.py`) takes a batch by the names of its fields and gives logits [B, C]; whether
those are images or rows of tokens, nobody here knows. B batch, C classes.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_zoo.core.aux import Stat, merge_stats
from moe_zoo.core.schema import Choice, choice, positive
from moe_zoo.data.labelled import LABELLED, labelled_batches, labelled_iterator, split_labelled
from moe_zoo.models.decoder import per_layer
from moe_zoo.sharding import readable
from moe_zoo.train import distributed
from moe_zoo.train.objective import Objective, cross_entropy
from moe_zoo.train.task import Task

#: of a batch, what is no input of the model
_ANSWERS = ("labels", "loss_mask", "loss_weights")


@dataclasses.dataclass(frozen=True)
class ClassificationConfig:
    """`label_smoothing` s: the target is 1 - s of the label and s of all classes alike."""

    label_smoothing: float = 0.0

    def validate(self, path: str) -> None:
        positive(self, path, "label_smoothing", zero=True)


class Classification(Objective):
    """Cross-entropy of the label, plus what the model's own losses add."""

    Config = ClassificationConfig
    batches: ClassVar[str] = "labelled"

    def loss(self, model, batch, ostate, *, step, key, fraction):
        logits_BC, aux = model(inputs(batch), train=True, step=step, key=key)
        nll_B = cross_entropy(logits_BC, batch["labels"])
        if smoothing := self.config.label_smoothing:
            even_B = jax.nn.logsumexp(logits_BC, axis=-1) - logits_BC.mean(-1)
            nll_B = (1 - smoothing) * nll_B + smoothing * even_B
        weights_B = batch["loss_weights"]
        task = jnp.sum(nll_B * weights_B)
        right_B = logits_BC.argmax(-1) == batch["labels"]
        extra, scalars = self.extra(aux, step)
        scalars |= {
            "loss": Stat.sum(task),
            "router_loss": Stat.sum(aux.total_loss() * fraction),
            "accuracy": Stat.mean(jnp.sum(right_B * weights_B), weights_B.sum()),
        }
        return task + (aux.total_loss() + extra) * fraction, {"scalars": scalars, "layers": aux.stats}

    def extra(self, aux, step) -> tuple[Any, dict[str, Stat]]:
        """What a subclass adds to the loss of a micro-batch, and its statistics."""
        return 0.0, {}


def inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What a model sees of a batch."""
    return {name: value for name, value in batch.items() if name not in _ANSWERS}


@dataclasses.dataclass(frozen=True)
class LabelsConfig:
    """`source`: one of `data.labelled.LABELLED` with its settings. `fractions` of each class: train, validation,
    test.
    """

    batches: ClassVar[str] = "labelled"

    name: str = "labelled"
    source: Choice = choice(LABELLED, "digits")
    batch_size: int = 64
    eval_batch_size: int = 128
    seed: int = 0
    fractions: tuple[float, ...] = (0.7, 0.1, 0.2)

    def validate(self, path: str) -> None:
        positive(self, path, "batch_size", "eval_batch_size")
        positive(self, path, "seed", zero=True)


class Labels(Task):
    """Labelled examples in three parts, the same shares of every class in each."""

    Config = LabelsConfig

    def __init__(self, config):
        super().__init__(config)
        data = config.data.source.make().load()
        config.model.check_examples(data)
        self.parts = split_labelled(data, config.data.fractions, config.data.seed)
        self.fingerprint, self.classes = data.fingerprint, data.classes
        self.tokens_per_step = config.data.batch_size * config.model.tokens_per_example

    def iterator(self, rows):
        data = self.config.data
        return labelled_iterator(self.parts["train"], batch_size=data.batch_size, seed=data.seed, rows=rows)

    def line(self, line):
        return {"bits": line["loss"] / math.log(2)}

    def score(self, model, part, sharding=None, max_rows=None):
        return evaluate_classes(
            model, self.parts[part], batch_size=self.config.data.eval_batch_size, sharding=sharding, max_rows=max_rows
        )

    def headline(self, score):
        return {name: score[name] for name in ("accuracy", "loss", "bits")}

    def summary(self):
        counts = ", ".join(f"{len(part):,} {name}" for name, part in self.parts.items())
        return f"{self.config.data.source.name}: {counts} examples of {len(self.classes)} classes"

    def final(self, run):
        trainer = run["trainer"]
        return self.score(trainer.model(run["state"]), "test", trainer.batch_sharding)

    def facts(self, run):
        model = run["trainer"].abstract
        tokens = self.config.model.tokens_per_example
        return {"flops_per_token": 3 * run["trainer"].objective.passes * model.flops_per_example() / tokens}

    def pictures(self, folder: Path, history, report):
        from moe_zoo.analysis.class_plots import plot_accuracy  # matplotlib: at the end

        return {"accuracy": plot_accuracy(history, folder / "accuracy.png")}


def evaluate_classes(
    model: nnx.Module, data, *, batch_size: int, sharding=None, max_rows: int | None = None
) -> dict[str, Any]:
    """{"accuracy", "loss" (nats), "bits" per example, "examples", "accuracy_by_class" {name}, "layers" [{"layer",
    statistic: value}], the model's statistics as means over all examples}.
    """
    rows = None if sharding is None else distributed.rows_here(sharding, batch_size, "data.eval_batch_size")
    graphdef, state = nnx.split(model)
    C, sums, layers = len(data.classes), 0.0, None
    for number, batch in enumerate(labelled_batches(data, batch_size=batch_size, max_rows=max_rows, rows=rows)):
        if sharding is not None:
            batch = distributed.put_batch(batch, sharding, batch_size)
        step = jax.device_get(_eval_step(graphdef, C, state, batch, np.int32(number)))
        more, layer = jax.tree.map(lambda x: x.astype(np.promote_types(x.dtype, np.float64)), step)
        sums = sums + np.stack(more)
        layers = layer if layers is None else {k: (ids, merge_stats(layers[k][1], s)) for k, (ids, s) in layer.items()}
    nats_C, right_C, count_C = sums
    count = max(count_C.sum(), 1)
    return {
        "accuracy": float(right_C.sum() / count),
        "loss": float(nats_C.sum() / count),
        "bits": float(nats_C.sum() / count / math.log(2)),
        "examples": int(count_C.sum()),
        "accuracy_by_class": {
            name: float(right / count) for name, right, count in zip(data.classes, right_C, count_C) if count
        },
        "layers": [
            {"layer": layer} | {name: np.asarray(value).tolist() for name, value in row.items()}
            for layer, row in per_layer(layers or {})
        ],
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def _eval_step(graphdef, C, state, batch, number):
    """((nats, right, count) by class, {path: (layer ids, statistics)})."""
    model = nnx.merge(graphdef, state)
    key = jax.random.fold_in(jax.random.key(0), number)
    logits_BC, aux = model(inputs(batch), valid=batch["loss_mask"], key=key)
    mine_CB = (batch["labels"] == jnp.arange(C)[:, None]) & batch["loss_mask"]
    nll_B = cross_entropy(logits_BC, batch["labels"])
    right_B = logits_BC.argmax(-1) == batch["labels"]
    sums = tuple(jnp.where(mine_CB, value, 0).sum(1) for value in (nll_B, right_B, jnp.ones_like(nll_B)))
    layers = {path: (ids, a.stats) for path, (ids, a) in aux.layers.items()}
    return readable(model.mesh, (sums, layers))
