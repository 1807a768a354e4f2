"""Selectors of depth on a finished model: put on, taught by labels that a search has found, set to a budget.

`add_selectors` and a run of `scripts/train.py` train FiRST and FTP; Dr.LLM learns from paths, and for that the model
only has to run once: its layers are frozen, so what each classifier reads along a path never changes.

N questions, S length, L layers.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Bool, Int

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build, overlay, to_dict
from moe_zoo.depth.dr_llm import CLASSES
from moe_zoo.depth.paths import TreeSearch, label_by_trying
from moe_zoo.inference.generate import bucket
from moe_zoo.inference.loaded import Loaded
from moe_zoo.models import ModelConfig
from moe_zoo.transform.adapters import rebuilt


def add_selectors(loaded: Loaded, depth: str | Mapping[str, Any], *, seed: int = 0) -> Loaded:
    """The model with a selector for each of its blocks, its own weights frozen: a name, or `{"name": ..., **settings}`.

    Weights keep their paths. `seed` draws the selectors. Raises ConfigError if there are selectors already, or if this
    is none for finished models.
    """
    if found := [kind for _, block, _ in loaded.model.blocks() if (kind := getattr(block, "selector", None))]:
        raise ConfigError(f"the model has selectors already, {type(found[0]).__name__}; begin from one without")
    settings = {"name": depth} if isinstance(depth, str) else dict(depth)
    config = build(ModelConfig, overlay(to_dict(loaded.config), {"depth": settings}), "model")
    if not config.depth.cls.retrofits:
        raise ConfigError(f"depth: {config.depth.name!r} is trained with its model, not put on a finished one")
    return rebuilt(loaded, config, P.arrays(loaded.model), seed)


def set_budget(loaded: Loaded, budget: float | None) -> Loaded:
    """The model whose `dr_llm` classifiers keep to another budget, in [-1, 1]; None: they decide alone."""
    _check(loaded)
    config = build(ModelConfig, overlay(to_dict(loaded.config), {"depth": {"budget": budget}}), "model")
    return rebuilt(loaded, config, P.arrays(loaded.model))


@dataclasses.dataclass(frozen=True)
class Questions:
    """Questions with their answers, one a row, padded on the right. `asked`: whose `targets` are the answer and its
    end; `prompt`: the tokens before the first of these.
    """

    tokens: Int[np.ndarray, "N S"]
    targets: Int[np.ndarray, "N S"]
    valid: Bool[np.ndarray, "N S"]
    prompt: Bool[np.ndarray, "N S"]
    asked: Bool[np.ndarray, "N S"]

    @classmethod
    def of(cls, loaded: Loaded, pairs: Sequence[tuple[str, str]]) -> "Questions":
        """Of (prompt, answer) texts; each begins and ends as a document does in training."""
        tok = loaded.tokenizer
        encoded = [(tok.encode(prompt), tok.encode(answer)) for prompt, answer in pairs]
        N, S = len(pairs), bucket(max(1 + len(p) + len(a) for p, a in encoded))
        tokens, targets = np.full((2, N, S), tok.pad_id, np.int32)
        valid, prompt, asked = np.zeros((3, N, S), bool)
        for row, (p, a) in enumerate(encoded):
            size = 1 + len(p) + len(a)
            tokens[row, :size], targets[row, :size] = [tok.bos_id, *p, *a], [*p, *a, tok.eos_id]
            valid[row, :size], prompt[row, : 1 + len(p)], asked[row, len(p) : size] = True, True, True
        return cls(tokens, targets, valid, prompt, asked)

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, which) -> "Questions":
        """Those of that number."""
        return Questions(*(getattr(self, field.name)[which] for field in dataclasses.fields(self)))


def answered(
    loaded: Loaded, questions: Questions, paths_NL: Int[np.ndarray, "N L"] | None = None, *, batch_size: int = 256
) -> tuple[Bool[np.ndarray, "N"], Int[np.ndarray, "N L"]]:
    """Which questions the model answers exactly, writing the likeliest token each time, and how often each layer was
    executed for it. `paths_NL`: how often each is to be; None: as the selectors decide by the prompt.

    Nothing is written: greedy decoding gives the answer exactly if, with the answer before it, each of its tokens and
    the end is the likeliest.
    """
    graphdef, state = nnx.split(loaded.model)
    right, times = np.zeros(len(questions), bool), np.zeros((len(questions), loaded.config.num_layers), np.int8)
    for begin in range(0, len(questions), batch_size):
        which = np.arange(begin, begin + batch_size) % len(questions)  # the last batch is filled up
        paths = {} if paths_NL is None else {"depth": np.asarray(paths_NL)[which].T.astype(np.int32)}
        hit_B, times_LB = jax.device_get(_answered(graphdef, state, vars(questions.take(which)), paths))
        right[which], times[which] = hit_B, times_LB.T
    return right, times


def label_paths(
    loaded: Loaded, questions: Questions, *, search: TreeSearch | None = None, seed: int = 0, batch_size: int = 256
) -> tuple[Int[np.ndarray, "N L"], Bool[np.ndarray, "N"]]:
    """The shortest path of each question that answers it, and which questions have one (the others: all ones).

    `search` None: one or two layers skipped and one repeated, all of it, which is right for few layers; else a tree.
    """
    _check(loaded)
    ask = lambda which, paths: answered(loaded, questions.take(which), paths, batch_size=batch_size)[0]
    return label_by_trying(ask, len(questions), loaded.config.num_layers, search, seed)


def teach_paths(
    loaded: Loaded,
    questions: Questions,
    labels_NL: Int[np.ndarray, "N L"],
    *,
    epochs: int = 25,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    warmup_steps: int = 500,
    seed: int = 0,
) -> tuple[Loaded, list[float]]:
    """The model whose classifiers, drawn anew by `seed`, have learned the labels; and the mean loss of every epoch.

    AdamW with a warm-up and a cosine to zero. The focal loss weights classes by how often the labels have them.
    """
    _check(loaded)
    counts = np.bincount(np.asarray(labels_NL).reshape(-1), minlength=len(CLASSES)).tolist()
    config = build(ModelConfig, overlay(to_dict(loaded.config), {"depth": {"class_counts": counts}}), "model")
    base = {name: x for name, x in P.arrays(loaded.model).items() if ".selector." not in name}
    fresh = rebuilt(loaded, config, base, seed)
    seen = _seen(fresh, questions, labels_NL, max(batch_size, 256))
    steps = epochs * (len(questions) // batch_size)
    if not steps:
        raise ConfigError(f"teach_paths: {len(questions)} questions are no batch of {batch_size}")
    rate = optax.warmup_cosine_decay_schedule(0, learning_rate, min(warmup_steps, steps // 2), steps)
    optimizer = optax.adamw(rate, weight_decay=weight_decay)
    values = {name: x for name, x in P.arrays(fresh.model).items() if ".selector." in name}
    state, losses, random = optimizer.init(values), [], np.random.default_rng(seed)
    learn = jax.jit(functools.partial(_learn, fresh.model, base, optimizer))
    for _ in range(epochs):
        order = random.permutation(len(questions))[: steps // epochs * batch_size]
        values, state, mean = learn(values, state, seen, order.reshape(-1, batch_size))
        losses.append(float(mean))
    return dataclasses.replace(fresh, model=P.replace(fresh.model, base | values)), losses


def _check(loaded: Loaded) -> None:
    if loaded.config.depth.name != "dr_llm":
        raise ConfigError(f"expected a model with depth 'dr_llm' (add_selectors), got {loaded.config.depth.name!r}")


def _seen(loaded: Loaded, questions: Questions, labels_NL, batch_size: int) -> dict[str, tuple]:
    """By the path of the stacked block, of every question: (windows [R, N, W, D], which there are, labels [R, N])."""
    graphdef, state = nnx.split(loaded.model)
    parts = []
    for begin in range(0, len(questions), batch_size):
        which = slice(begin, begin + batch_size)
        paths_LB = np.asarray(labels_NL)[which].T.astype(np.int32)
        parts.append(jax.device_get(_windows(graphdef, state, vars(questions.take(which)), paths_LB)))
    together = jax.tree.map(lambda *each: np.concatenate(each, axis=1), *parts)
    labels_LN = np.asarray(labels_NL).T.astype(np.int32)
    return {path: (*together[path], labels_LN[list(ids)]) for path, _, ids in loaded.model.blocks()}


def _learn(model, base, optimizer, values, state, seen, batches):
    """One epoch: (values, optimizer's state, mean loss)."""

    def loss(values, which):
        blocks = dict((path, block) for path, block, _ in P.replace(model, base | values).blocks())
        of_layer = jax.vmap(lambda selector, *read: selector.loss(*read)[0])
        each = [of_layer(blocks[path].selector, *(x[:, which] for x in read)) for path, read in seen.items()]
        return jnp.concatenate(each).mean()

    def step(carry, which):
        values, state = carry
        nats, gradients = jax.value_and_grad(loss)(values, which)
        updates, state = optimizer.update(gradients, state, values)
        return (optax.apply_updates(values, updates), state), nats

    (values, state), nats = jax.lax.scan(step, (values, state), batches)
    return values, state, nats.mean()


@functools.partial(jax.jit, static_argnums=0)
def _answered(graphdef, state, asked, inputs):
    model = nnx.merge(graphdef, state)
    logits, aux, _ = model(asked["tokens"], valid=asked["valid"], prompt=asked["prompt"], inputs=inputs, record=True)
    hit_BS = (logits.argmax(-1) == asked["targets"]) | ~asked["asked"]
    times_LB = jnp.ones((model.config.num_layers, len(hit_BS)), jnp.int32)
    for ids, told in aux.layers.values():
        if "depth_through" in told.terms:
            times_LB = times_LB.at[ids].set(told.terms["depth_through"].max(-1))
    return hit_BS.all(1), times_LB


@functools.partial(jax.jit, static_argnums=0)
def _windows(graphdef, state, asked, paths_LB):
    model = nnx.merge(graphdef, state)
    inputs = {"depth": paths_LB}
    more = dict(valid=asked["valid"], prompt=asked["prompt"], inputs=inputs)
    _, aux, _ = model(asked["tokens"], train=True, record=True, **more)
    return {path: (aux.terms["depth_windows"], aux.terms["depth_live"]) for path, (_, aux) in aux.layers.items()}
