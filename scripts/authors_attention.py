"""Our routed attention beside code in PyTorch. Each function gives the figures of authors.py for one comparison."""

import inspect

import jax.numpy as jnp
import numpy as np
from authors_inputs import normal
from checkout import Checkout, difference, numpy, tensor, torch

from moe_zoo.core import param as P
from moe_zoo.layers.attention import AttentionConfig, View
from moe_zoo.mixers.routed_attention import RoutedAttention, RoutedAttentionConfig

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
