"""Answers of a model: how surprising the right ones are, and how many it would write itself, task by task.

A model that writes the most likely token each time writes the right answer exactly if, with the right answer before
it, each of its tokens and the end is the most likely one: so one pass that is given the answers tells, and nothing has
to be generated.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_zoo.adapters.instructions import of_each
from moe_zoo.analysis.specialization import Specialization
from moe_zoo.core.aux import merge_stats
from moe_zoo.data import Corpus, DataError, Tokenizer
from moe_zoo.data.pipeline import Batch
from moe_zoo.data.tasks import INSTRUCTIONS
from moe_zoo.models.decoder import per_layer
from moe_zoo.train.objective import cross_entropy, forward


@dataclasses.dataclass(frozen=True)
class Score:
    """By task: `loss`, nats per token of the answers and their ends; `exact`, the share of answers that are right;
    `questions`. `specialization`: which task used which expert; `experts_per_token` of each layer of adapters, by id.
    """

    loss: dict[str, float]
    exact: dict[str, float]
    questions: dict[str, int]
    specialization: Specialization
    experts_per_token: dict[int, float]


def sample(corpus: Corpus, count: int) -> Corpus:
    """At most so many documents of each domain, evenly spaced."""
    chosen = []
    for domain in range(len(corpus.domains)):
        own = np.flatnonzero(corpus.domain_ids == domain)
        kept = min(count, len(own))
        chosen.append(own[np.arange(kept) * len(own) // max(kept, 1)])
    return corpus.select(np.concatenate(chosen))


def score(model: nnx.Module, corpus: Corpus, tokenizer: Tokenizer, *, seq_len: int, batch_size: int) -> Score:
    """Scores every document of a supervised corpus, whole. Raises DataError if one is longer than `seq_len`."""
    graphdef, state = nnx.split(model)
    nats, hits, count = np.zeros((3, len(corpus)))
    instructed = model.instruction_size is not None
    tokens, layers = np.zeros(len(corpus.domains)), None
    for batch, documents in whole_documents(corpus, tokenizer, seq_len, batch_size, by_domain=instructed):
        if instructed:
            domains = [corpus.domains[max(domain, 0)] for domain in batch["domain"][:, 0]]
            batch["instructions"] = of_each(model, [INSTRUCTIONS[task] for task in domains], batch_size)
        nll_BS, hit_BS, layer = jax.device_get(_score(graphdef, len(corpus.domains), state, batch))
        counted = batch["loss_mask"]
        np.add.at(nats, documents[counted], nll_BS[counted])
        np.add.at(hits, documents[counted], hit_BS[counted])
        np.add.at(count, documents[counted], 1)
        tokens += np.bincount(batch["domain"][batch["domain"] >= 0], minlength=len(tokens))
        layers = layer if layers is None else {k: (ids, merge_stats(layers[k][1], s)) for k, (ids, s) in layer.items()}
    rows = per_layer(layers)
    load = [(layer, row["load_by_domain"]) for layer, row in rows if "load_by_domain" in row]
    by_task = {name: corpus.domain_ids == i for i, name in enumerate(corpus.domains)}
    by_task = {name: own for name, own in by_task.items() if own.any()}
    return Score(
        {name: float(nats[own].sum() / count[own].sum()) for name, own in by_task.items()},
        {name: float((hits[own] == count[own]).mean()) for name, own in by_task.items()},
        {name: int(own.sum()) for name, own in by_task.items()},
        Specialization.of(corpus.domains, tokens, load),
        {layer: float(row["experts_per_token"]) for layer, row in rows if "experts_per_token" in row},
    )


def whole_documents(
    corpus: Corpus, tokenizer: Tokenizer, seq_len: int, batch_size: int, by_domain: bool = False
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Batches whose rows hold whole documents, one after the other (`by_domain`: only of one domain), and for each
    position which document it is of.
    """
    ends = corpus.trained_ends()
    rows: list[list[int]] = [[]]
    used = 0
    for i in range(len(corpus)):
        size = len(corpus.document(i)) + 1
        if size > seq_len:
            raise DataError(f"a question and its answer have {size} tokens, which is more than seq_len={seq_len}")
        other = by_domain and rows[-1] and corpus.domain_ids[rows[-1][-1]] != corpus.domain_ids[i]
        if used + size > seq_len or other:
            rows.append([])
            used = 0
        rows[-1].append(i)
        used += size
    for begin in range(0, len(rows), batch_size):
        shape = (batch_size, seq_len)
        fill = {"tokens": tokenizer.pad_id, "targets": tokenizer.pad_id, "segment_ids": 0, "positions": 0, "domain": -1}
        batch = {name: np.full(shape, value, np.int32) for name, value in fill.items()}
        batch["loss_mask"], documents = np.zeros(shape, bool), np.full(shape, -1)
        for row, members in enumerate(rows[begin : begin + batch_size]):
            at = 0
            for number, i in enumerate(members, 1):
                ids, trained = corpus.document(i), corpus.trained[corpus.offsets[i] : corpus.offsets[i + 1]]
                here = row, slice(at, at + len(ids) + 1)
                batch["tokens"][here] = [tokenizer.bos_id, *ids]
                batch["targets"][here] = [*ids, tokenizer.eos_id]
                batch["loss_mask"][here] = [*trained, ends[i]]
                batch["segment_ids"][here], batch["domain"][here] = number, corpus.domain_ids[i]
                batch["positions"][here], documents[here] = np.arange(len(ids) + 1), i
                at += len(ids) + 1
        yield batch, documents


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(graphdef, num_domains: int, state, batch: Mapping[str, Any]):
    model, instructions = nnx.merge(graphdef, state), batch.get("instructions")
    logits, aux = forward(model, batch, num_domains=num_domains, instructions=instructions)
    hit_BS = jnp.argmax(logits, -1) == batch["targets"]
    layers = {path: (ids, a.stats) for path, (ids, a) in aux.layers.items()}
    return cross_entropy(logits, batch["targets"]), hit_BS, layers
