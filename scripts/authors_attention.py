"""Our routed attention and early exits beside code in PyTorch. Each function gives the figures of one comparison."""

import collections
import inspect
from types import SimpleNamespace as Space

import jax
import jax.numpy as jnp
import numpy as np
from authors_inputs import normal
from checkout import Checkout, difference, numpy, tensor, torch

from moe_zoo.core import param as P
from moe_zoo.layers.attention import AttentionConfig, View
from moe_zoo.layers.exits import divergence, exit_pdf, geometric
from moe_zoo.mixers.routed_attention import RoutedAttention, RoutedAttentionConfig
from moe_zoo.models.ponder import Ponder, PonderConfig
from moe_zoo.train.objective import cross_entropy

#: sequences, their length, heads of 8 numbers, clusters, members of each
B, S, N, H, K, W = 2, 64, 4, 8, 8, 8


def routing_transformer(checkout: Checkout) -> dict[str, float]:
    """Causal attention within clusters with shared queries and keys, the commitment loss, and the next means."""
    mine = dict(local_heads=0, num_clusters=K, window=W, vectors="unit", sees_itself=False, count_eps=1e-5)
    mine |= dict(decay=0.9, commitment=1.0)
    attention, D = AttentionConfig(num_attention_heads=N, rotary_dim=0), N * H
    ours = RoutedAttention(RoutedAttentionConfig(**mine), attention, hidden_size=D, out_scale=1.0)
    values = P.arrays(P.materialize(ours, 0))
    ours = P.replace(ours, values | {"o": jnp.eye(D).reshape(N, H, D)})
    x = normal(0, B, S, D)
    y, _, aux = ours(x, View(jnp.broadcast_to(jnp.arange(S), (B, S)), train=True))

    theirs = checkout.run(
        "routing_transformer/routing_transformer.py",
        "exists", "default", "is_empty", "max_neg_value", "batched_index_select", "expand_dim", "scatter_mean",
        "split_at_index", "ema", "ema_inplace", "similarity", "dists_and_buckets", "batched_bincount", "kmeans_iter",
        "distribution", "Kmeans", "KmeansAttention",
        isfunction=inspect.isfunction, TOKEN_SELF_ATTN_VALUE=-5e4, KMEAN_INIT_ITERS=10,
    )  # fmt: skip
    module = theirs.KmeansAttention(K, W, N, H, causal=True, ema_decay=0.9, commitment=1.0, shared_qk=True)
    module.kmeans.means.copy_(tensor(values["means"]))
    module.kmeans.initted.fill_(True)
    heads = lambda name: tensor(np.einsum("bsd,dnh->bnsh", x, values[name]))
    with torch.no_grad():
        out, loss = module(heads("q"), heads("q"), heads("v"))
        module.kmeans.update()
    out = numpy(out).transpose(0, 2, 1, 3).reshape(B, S, D)
    return {
        "output": difference(y, out), "commitment": difference(aux.losses["commitment"], numpy(loss)),
        "means": difference(ours.after_step(aux.stats)["means"], numpy(module.kmeans.means)),
    }  # fmt: skip


def palbert(checkout: Checkout) -> dict[str, float]:
    """Lambda's head, probabilities of leaving, the loss and its prior, given what is pooled; where an example leaves by
    quantile. Of their encoder nothing but what it hands on.
    """
    D, C, L, examples = 16, 3, 12, 64
    config = PonderConfig(
        hidden_size=D, num_attention_heads=2, num_hidden_layers=L, num_classes=C, vocab_size=4, seq_len=1, eps=0.05
    )  # fmt: skip
    ours = P.materialize(Ponder(config), 0)
    values = P.arrays(ours) | {
        "halt.kernel": jnp.asarray(normal(9, 2 * D, 1)),
        "head.kernel": jnp.asarray(normal(8, D, C)),
    }
    ours, hidden = P.replace(ours, values), normal(0, L, examples, D)
    pooled = [jnp.tanh(ours.pool(h)) for h in hidden]
    before = [jnp.zeros_like(pooled[0]), *pooled[:-1]]
    halt = jnp.stack([jax.nn.sigmoid(ours.halting(*pair)) for pair in zip(pooled, before, strict=True)])
    pdf, passed = exit_pdf(halt.T, "released", 0.05)
    logits = jnp.stack([ours.head(g) for g in pooled])
    labels = np.arange(examples) % C
    nll = jnp.stack([cross_entropy(z, labels) for z in logits])
    task = jnp.mean(jnp.sum(jnp.where(passed.T.all(1, keepdims=True), 0, pdf.T) * nll, 0))

    model, ask, of = _released_model(checkout, values, hidden, C)
    losses = checkout.run("src/loss.py", "RegularizationLoss")
    with torch.no_grad():
        found = model.forward(input_ids=torch.zeros(examples, 1, dtype=torch.long), **ask)
        target, total = torch.tensor(labels), 0.0
        for p, z in zip(found["exit_pdf"], found["logits"]):
            total += (p * torch.nn.functional.cross_entropy(z, target, reduction="none")).mean()
        there = torch.stack(found["exit_pdf"], 1)
        kl = losses.RegularizationLoss(0.1, L)(there)
        model.training, depths = False, []
        for i in range(examples):
            of["examples"], model.inference_layers_num = slice(i, i + 1), 0
            model.forward(input_ids=torch.zeros(1, 1, dtype=torch.long), **ask)
            depths.append(model.inference_layers_num)
    alive = jnp.cumprod(1 - halt, 0)
    mine = np.asarray(jnp.minimum((1 - alive <= 0.5).sum(0) + 1, L))
    return {
        "pdf": difference(pdf, there), "loss": difference(task, numpy(total)),
        "divergence": difference(divergence(pdf, geometric(0.1, L), "prior_to_exit").mean(), numpy(kl)),
        "depth": int((mine != np.array(depths)).sum()),
    }  # fmt: skip


def _released_model(checkout: Checkout, values, hidden: np.ndarray, C: int):
    """(their model with our heads, whose layers return `hidden` [L, examples, D], arguments of its forward pass, which
    examples it is shown).
    """
    L, _, D = hidden.shape
    given = dict(AlbertPreTrainedModel=object, AlbertConfig=None, defaultdict=collections.defaultdict)
    theirs = checkout.run("src/modeling/palbert_fast.py", "LambdaLayer", "PAlbertModel", **given)
    exits = theirs.LambdaLayer(num_layers=3, hidden_dim=2 * D)
    exits.cls = _linear(values, "halt")
    for i, layer in enumerate(exits.feature_extractor):
        layer[0] = _linear(values, f"hidden.{i}")
    model, of = theirs.PAlbertModel.__new__(theirs.PAlbertModel), {"examples": slice(None)}
    layer = lambda x, current_layer, **_: (tensor(hidden[current_layer, of["examples"]])[:, None],)
    vars(model).update(
        config=Space(num_hidden_layers=L, num_labels=C), encoder=Space(adaptive_forward=layer), training=True,
        epsilon=0.05, threshold=0.5, pooler_for_task=True, embeddings=lambda *_, **__: None, dtype=torch.float32,
        pooler=_linear(values, "pool"), pooler_activation=torch.tanh, parameters=lambda: iter([torch.zeros(1)]),
        inference_layers_num=0, inference_instances_num=0,
    )  # fmt: skip
    layers = Space(cls_head=_linear(values, "head"), exit_head=exits)
    ask = dict(output_dropout=lambda x: x, output_layers=layers, use_layer_pos_embeddings=False, use_prev_hiddens=True)
    return model, ask, of


def _linear(values, name: str):
    """Their layer with our weights."""
    kernel = np.asarray(values[f"{name}.kernel"])
    made = torch.nn.Linear(*kernel.shape)
    made.weight.data, made.bias.data = tensor(kernel.T), tensor(values[f"{name}.bias"])
    return made
