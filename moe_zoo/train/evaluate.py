"""Bits per byte of a model on a split, per domain and byte-weighted over all."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

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

    Returns {"bits_per_byte": {"overall", "domains"}, "scored" ("text" or "answers"), "loss" (nats per token), "tokens",
    "bytes" {domain}, "expert_load" [L][E] shares, "load_by_domain" [L][domains][E] counts, "context_length",
    "min_context"}.
    A document's end counts as one more target, so the model pays for saying where documents stop. Of supervised
    documents the targets are the answers' tokens and their end, and the bytes are the answers' alone.
    """
    graphdef, state = nnx.split(model)
    X = len(corpus.domains)
    nats, count, layers = np.zeros(X), np.zeros(X), None
    rows = None if sharding is None else distributed.rows_here(sharding, batch_size, "data.eval_batch_size")
    for batch in eval_batches(
        corpus, tokenizer, seq_len=seq_len, stride=stride, batch_size=batch_size, max_rows=max_rows, rows=rows
    ):
        if sharding is not None:
            batch = distributed.put_batch(batch, sharding, batch_size)
        n, c, layer = jax.device_get(_eval_step(graphdef, X, state, batch))
        nats, count = nats + n, count + c
        layers = layer if layers is None else {k: (ids, merge_stats(layers[k][1], s)) for k, (ids, s) in layer.items()}
    targets = np.array([corpus.targets_per_domain()[d] for d in corpus.domains], float)
    size = np.array([corpus.trained_bytes_per_domain()[d] for d in corpus.domains], float)
    # a partial look scores a sample of the targets: its bytes are those of the sample
    scored_bytes = np.where(targets > 0, count * size / np.maximum(targets, 1), 0)
    bits = nats / math.log(2)
    rows = per_layer(layers) if layers else []
    counts = [np.asarray(row["load"], float) for _, row in rows if "load" in row]
    return {
        "bits_per_byte": {
            "overall": float(bits.sum() / max(scored_bytes.sum(), 1)),
            "domains": {
                d: float(bits[i] / scored_bytes[i]) for i, d in enumerate(corpus.domains) if scored_bytes[i] > 0
            },
        },
        "scored": "text" if corpus.trained is None else "answers",
        "loss": float(nats.sum() / max(count.sum(), 1)),
        "tokens": int(count.sum()),
        "bytes": {d: int(size[i]) for i, d in enumerate(corpus.domains)},
        "expert_load": [(c / max(c.sum(), 1)).tolist() for c in counts],
        "load_by_domain": [np.asarray(row["load_by_domain"]).tolist() for _, row in rows if "load_by_domain" in row],
        "context_length": seq_len,
        "min_context": seq_len - (stride or seq_len),
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def _eval_step(graphdef, num_domains, state, batch):
    model = nnx.merge(graphdef, state)
    logits, aux = forward(model, batch, num_domains=num_domains)
    nll_BS = jnp.where(batch["loss_mask"], cross_entropy(logits, batch["targets"]), 0)
    # (domains, B, S): few domains, so comparing is cheaper than a scatter
    mine = (batch["domain"] == jnp.arange(num_domains)[:, None, None]) & batch["loss_mask"]
    nats = jnp.where(mine, nll_BS, 0).sum((1, 2))
    layers = {path: (ids, a.stats) for path, (ids, a) in aux.layers.items()}
    return readable(model.mesh, (nats, mine.sum((1, 2)), layers))
