"""Bits per byte of a model on a split, per domain and byte-weighted over all; and which domain used which expert."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_zoo.analysis.sparsity import CHUNK
from moe_zoo.analysis.specialization import Specialization
from moe_zoo.core.aux import merge_stats
from moe_zoo.data import Corpus, Tokenizer, eval_batches
from moe_zoo.models.decoder import per_layer
from moe_zoo.sharding import readable
from moe_zoo.train import distributed
from moe_zoo.train.objective import cross_entropy, forward


def evaluate(
    model: nnx.Module,
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    stride: int | None = None,
    max_rows: int | None = None,
    sharding=None,
) -> dict[str, Any]:
    """Scores every target of the split once (or `max_rows` evenly spaced rows of it).

    Returns {"bits_per_byte": {"overall", "domains"}, "scored" ("text" or "answers"), "loss" (nats per token),
    "loss_by_domain" {domain}, "tokens", "bytes" {domain}, "expert_load" [L][E] shares, "specialization"
    (`analysis.Specialization.to_dict`; tokens that overlapping windows show twice count twice), "sparsity"
    (`sparsity`), "context_length", "min_context"}.
    A document's end counts as one more target, so the model pays for saying where documents stop. Of supervised
    documents the targets are the answers' tokens and their end, and the bytes are the answers' alone.
    """
    rows = None if sharding is None else distributed.rows_here(sharding, batch_size, "data.eval_batch_size")
    batches = eval_batches(
        corpus, tokenizer, seq_len=seq_len, stride=stride, batch_size=batch_size, max_rows=max_rows, rows=rows
    )
    if sharding is not None:
        batches = (distributed.put_batch(batch, sharding, batch_size) for batch in batches)
    total = _totals(model, batches, len(corpus.domains))
    nats, count = total["nats"], total["scored"]
    targets = np.array([corpus.targets_per_domain()[d] for d in corpus.domains], float)
    size = np.array([corpus.trained_bytes_per_domain()[d] for d in corpus.domains], float)
    # a partial look scores a sample of the targets: its bytes are those of the sample
    scored_bytes = np.where(targets > 0, count * size / np.maximum(targets, 1), 0)
    bits = nats / math.log(2)
    counts = [np.asarray(row["load"], float) for _, row in total["layers"] if "load" in row]
    return {
        "bits_per_byte": {
            "overall": float(bits.sum() / max(scored_bytes.sum(), 1)),
            "domains": {
                d: float(bits[i] / scored_bytes[i]) for i, d in enumerate(corpus.domains) if scored_bytes[i] > 0
            },
        },
        "scored": "text" if corpus.trained is None else "answers",
        "loss": float(nats.sum() / max(count.sum(), 1)),
        "loss_by_domain": {d: float(nats[i] / count[i]) for i, d in enumerate(corpus.domains) if count[i] > 0},
        "tokens": int(count.sum()),
        "bytes": {d: int(size[i]) for i, d in enumerate(corpus.domains)},
        "expert_load": [(c / max(c.sum(), 1)).tolist() for c in counts],
        "specialization": _specialization(corpus.domains, total).to_dict(),
        "sparsity": sparsity(total["layers"]),
        "context_length": seq_len,
        "min_context": seq_len - (stride or seq_len),
    }


def specialization(model: nnx.Module, batches: Iterable[Mapping[str, Any]], domains: Sequence[str]) -> Specialization:
    """Which domain uses which expert, per routed layer, on batches of `data.eval_batches` (held-out text, please).

    Every kind of decision that sends tokens to experts is counted; a router that mixes parameters instead sends none.
    `evaluate` measures the same on its way; this is for who has batches and no need of a score.
    """
    return _specialization(domains, _totals(model, batches, len(domains)))


def sparsity(layers: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """BlockFFN's statistics (`analysis.sparsity`), of layers whose tokens have experts of their own, a number each:
    {"layers": ids, "token": TLS, "chunk": CLS, "reuse", "chunk_length": of CLS}. None where rows are too short.
    """
    rows = [(layer, row) for layer, row in layers if "token_level_sparsity" in row]
    names = {"token": "token_level_sparsity", "chunk": "chunk_level_sparsity", "reuse": "expert_reuse"}
    each = lambda name: [float(row[name]) if name in row else None for _, row in rows]
    found = {key: each(name) for key, name in names.items()}
    return {"layers": [layer for layer, _ in rows], "chunk_length": CHUNK, **found}


def _specialization(domains: Sequence[str], total: dict[str, Any]) -> Specialization:
    load = [(layer, row["load_by_domain"]) for layer, row in total["layers"] if "load_by_domain" in row]
    return Specialization.of(domains, total["tokens"], load)


def _totals(model: nnx.Module, batches: Iterable[Mapping[str, Any]], num_domains: int) -> dict[str, Any]:
    """Sums over the batches by domain ("nats", "scored", "tokens"), and "layers": [(id, {statistic: value})]."""
    graphdef, state = nnx.split(model)
    sums, layers = np.zeros((3, num_domains)), None
    for number, batch in enumerate(batches):
        # on the host in float64: float32 counts stop at 2**24
        step = jax.device_get(_eval_step(graphdef, num_domains, state, batch, np.int32(number)))
        more, layer = jax.tree.map(lambda x: x.astype(np.promote_types(x.dtype, np.float64)), step)
        sums = sums + np.stack(more)
        layers = layer if layers is None else {k: (ids, merge_stats(layers[k][1], s)) for k, (ids, s) in layer.items()}
    return dict(zip(("nats", "scored", "tokens"), sums)) | {"layers": per_layer(layers) if layers else []}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _eval_step(graphdef, num_domains, state, batch, number):
    model = nnx.merge(graphdef, state)
    # for routers that draw at inference too: other draws for every batch, the same in every evaluation
    key = jax.random.fold_in(jax.random.key(0), number)
    logits, aux = forward(model, batch, num_domains=num_domains, key=key)
    nll_BS = jnp.where(batch["loss_mask"], cross_entropy(logits, batch["targets"]), 0)
    # (domains, B, S): few domains, so comparing is cheaper than a scatter
    mine = batch["domain"] == jnp.arange(num_domains)[:, None, None]
    scored = mine & batch["loss_mask"]
    nats = jnp.where(scored, nll_BS, 0).sum((1, 2))
    layers = {path: (ids, a.stats) for path, (ids, a) in aux.layers.items()}
    return readable(model.mesh, ((nats, scored.sum((1, 2)), mine.sum((1, 2))), layers))
