"""Softmax attention over given keys, and over a sequence's own in blocks, with a backward pass that keeps no scores.

On one NVIDIA GPU the latter is `pallas_kernels.causal_attention` where that takes the operands.

B batch, S queries, L keys, N query heads, M key-value heads, G = N / M, H head size.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_zoo.core.sight import Sight
from pallas_kernels import causal_attention


def attend(
    q_BNSH: Float[Array, "B N S H"],
    k_BMLH: Float[Array, "B M L H"],
    v_BMLH: Float[Array, "B M L V"],
    mask_BSL: Bool[Array, "B S L"],
    scale: float | None = None,
    sinks_N: Float[Array, "N"] | None = None,
    bias_NSL: Float[Array, "N S L"] | None = None,
) -> Float[Array, "B N S V"]:
    """softmax(q k * scale + bias) v, scale 1/sqrt(H) if not given, over the allowed keys. Softmax in float32. A query
    that may see nothing averages all.
    """
    return _attend(q_BNSH, k_BMLH, v_BMLH, mask_BSL, _scale(q_BNSH, scale), sinks_N, bias_NSL)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def attend_causally(
    q_BNSH: Float[Array, "B N S H"],
    k_BMSH: Float[Array, "B M S H"],
    v_BMSH: Float[Array, "B M S V"],
    sinks_N: Float[Array, "N"] | None,
    sight: Sight,
    window: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B N S V"]:
    """`attend` of a sequence to itself, as far as `sight` goes, in its blocks.

    The backward pass makes the weights again, block by block, from the maximum and the sum of each query's scores
    (FlashAttention, arXiv 2205.14135, section 3.1): what is kept does not grow with S^2.

    implementation: "xla" goes through the blocks; "pallas_gpu" is `pallas_kernels.causal_attention`, interpreted when
    lowered for a CPU, where a query that may see nothing gives zeros and hands on no gradient. None takes the latter
    where this is traced for an NVIDIA GPU, takes the operands, and is the only device.
    Raises ValueError for another name, NotImplementedError if the kernel can't take the operands.
    """
    return _forward(q_BNSH, k_BMSH, v_BMSH, sinks_N, sight, window, scale, implementation)[0]


def _tokens(sight: Sight, window: int | None) -> causal_attention.Tokens:
    """A sequence's sight of itself as the kernels want it."""
    segments = jnp.zeros_like(sight.positions) if sight.segment_ids is None else sight.segment_ids
    keys = segments if sight.key_valid is None else jnp.where(sight.key_valid, segments, jnp.iinfo(jnp.int32).min)
    return causal_attention.Tokens(sight.positions, segments, keys, window, sight.chunk)


def _forward(q, k, v, sinks, sight, window, scale, implementation):
    def kernel(q, k, v, sinks, sight, interpret=False):
        return causal_attention.forward(q, k, v, _tokens(sight, window), scale=_scale(q, scale), interpret=interpret)

    blocks = functools.partial(_forward_blocks, window, scale)
    result = causal_attention.run(implementation, blocks, kernel, q, k, v, sinks, sight)
    return result[0], (q, k, v, sinks, sight, *result)


def _forward_blocks(window, scale, q, k, v, sinks, sight):
    """The output; per query the highest score and one over the sum of exponentials beside it."""
    blocks = [
        _attend(q[:, :, rows], k[:, :, keys], v[:, :, keys], sight.mask(rows, keys, window), _scale(q, scale), sinks)
        for rows, keys in sight.blocks()
    ]
    return tuple(jnp.concatenate(parts, axis=2) for parts in zip(*blocks, strict=True))


def _backward(window, scale, implementation, kept, g_BNSV):
    def kernel(q, k, v, sinks, sight, *rest, interpret=False):
        how = dict(scale=_scale(q, scale), interpret=interpret)
        return *causal_attention.gradients(q, k, v, _tokens(sight, window), *rest, **how), None

    blocks = functools.partial(_backward_blocks, window, scale)
    return *causal_attention.run(implementation, blocks, kernel, *kept, g_BNSV), None


def _backward_blocks(window, scale, q, k, v, sinks, sight, out, highest, inverse, g_BNSV):
    """Gradients of q, k, v and sinks."""
    # what the softmax takes off again: the rows' weighted mean of the gradient of their weights
    mean = jnp.sum(g_BNSV.astype(highest.dtype) * out.astype(highest.dtype), -1)
    dq, dk_BMHS, dv_BMVS = [], None, None
    for rows, keys in reversed(list(sight.blocks())):  # the last block reaches all keys, the others add to its
        mask, cut = sight.mask(rows, keys, window), lambda x, rows=rows: x[:, :, rows]
        block = tuple(map(cut, (q, highest, inverse, mean, g_BNSV)))
        new_dq, new_dk, new_dv = _block_gradients(block, k[:, :, keys], v[:, :, keys], mask, _scale(q, scale))
        dq.insert(0, new_dq)
        dk_BMHS = new_dk if dk_BMHS is None else _add_at_start(dk_BMHS, new_dk)
        dv_BMVS = new_dv if dv_BMVS is None else _add_at_start(dv_BMVS, new_dv)
    d_sinks = None
    if sinks is not None:
        weight = jnp.exp(sinks.astype(highest.dtype)[:, None] - highest) * inverse
        d_sinks = -jnp.sum(weight * mean, (0, 2)).astype(sinks.dtype)
    back = lambda x, like: jnp.swapaxes(x, 2, 3).astype(like.dtype)
    return jnp.concatenate(dq, axis=2).astype(q.dtype), back(dk_BMHS, k), back(dv_BMVS, v), d_sinks


attend_causally.defvjp(_forward, _backward)


def _block_gradients(block, k_BMLH, v_BMLV, mask_BSL, scale):
    """dq [B, N, S, H] of one block of queries; dk and dv of its keys, transposed: [B, M, H, L] and [B, M, V, L].

    The other way round the product would contract the first dim of the scores, which XLA does outside its fast library
    on a CPU, at half the speed. So it is with the transposes that this needs, if XLA may fold them into the product.
    """
    q, highest, inverse, mean, g = (_stack(x, k_BMLH.shape[1]) for x in block)
    exp = jnp.exp(_scores(q * scale, k_BMLH, mask_BSL) - highest[..., None])
    weights = exp * inverse[..., None]
    d_weights = jnp.einsum("bmsv,bmlv->bmsl", g, v_BMLV.astype(g.dtype))
    # a query that may see nothing weighs all alike, whatever its scores are
    d_scores = jnp.where(_stacked(mask_BSL, q), weights * (d_weights - mean[..., None]), 0).astype(q.dtype)
    dq = jnp.einsum("bmsl,bmlh->bmsh", d_scores, k_BMLH.astype(q.dtype)) * scale
    q_BMHS, g_BMVS = jax.lax.optimization_barrier((jnp.swapaxes(q * scale, 2, 3), jnp.swapaxes(g, 2, 3)))
    dk = jnp.einsum("bmhs,bmsl->bmhl", q_BMHS, d_scores)
    dv = jnp.einsum("bmvs,bmsl->bmvl", g_BMVS, weights.astype(g.dtype))
    return dq.reshape(block[0].shape), dk, dv


def _attend(q_BNSH, k_BMLH, v_BMLV, mask_BSL, scale, sinks_N, bias_NSL=None):
    """The output; per query the highest score and one over the sum of exponentials beside it."""
    B, N, S, _ = q_BNSH.shape
    q = _stack(q_BNSH * scale, k_BMLH.shape[1])
    scores = _scores(q, k_BMLH, mask_BSL, bias_NSL)
    highest = jnp.max(scores, -1)
    if sinks_N is not None:
        sinks = _stack(jnp.broadcast_to(sinks_N.astype(scores.dtype)[:, None], (B, N, S)), k_BMLH.shape[1])
        highest = jnp.maximum(highest, sinks)
    highest = jax.lax.stop_gradient(highest)
    exp = jnp.exp(scores - highest[..., None])
    total = jnp.sum(exp, -1)
    if sinks_N is not None:
        total = total + jnp.exp(sinks - highest)
    inverse = 1 / total
    out = jnp.einsum("bmsl,bmlv->bmsv", exp.astype(q.dtype), v_BMLV.astype(q.dtype))
    out = (out * inverse[..., None]).astype(q.dtype)
    return out.reshape(B, N, S, -1), highest.reshape(B, N, S), inverse.reshape(B, N, S)


def _stack(x, M):
    """The G queries of a key-value head along the sequence: products are then plain batched matmuls with the batch in
    front; other layouts cost twice as much on a CPU.
    """
    B, N, S, *rest = x.shape
    return x.reshape(B, M, N // M * S, *rest)


def _stacked(mask_BSL, q):
    B, M, rows, _ = q.shape
    _, S, L = mask_BSL.shape
    return jnp.broadcast_to(mask_BSL[:, None, None], (B, M, rows // S, S, L)).reshape(B, M, rows, L)


def _scores(q, k_BMLH, mask_BSL, bias_NSL=None):
    scores = jnp.einsum("bmsh,bmlh->bmsl", q, k_BMLH.astype(q.dtype))
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    if bias_NSL is not None:
        scores = scores + bias_NSL.reshape(scores.shape[1:])
    return jnp.where(_stacked(mask_BSL, q), scores, jnp.finfo(scores.dtype).min)


def _scale(q, scale):
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


def _add_at_start(whole, part):
    added = jax.lax.slice_in_dim(whole, 0, part.shape[3], axis=3) + part
    return jax.lax.dynamic_update_slice_in_dim(whole, added, 0, axis=3)
