"""THOR's objective (Zuo et al., arXiv 2110.04260): two passes over a batch with other experts, which should agree.

    L = CE_a + CE_b + alpha CR,   CR = 1/2 (KL(p_a || p_b) + KL(p_b || p_a)) = 1/2 sum_v (p_a - p_b) (log p_a - log p_b)

Per token; means over the tokens that count, as of the plain loss. Both passes get gradient from CR. Router losses count
in both passes. Reported are means over the two passes, so `loss` is the cross-entropy of one model; what is minimised
is twice that, and alpha times `consistency`. Any router may be trained with it; one that draws nothing agrees with
itself (CR = 0).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.core.aux import Stat, merge_stats
from moe_zoo.core.schema import positive
from moe_zoo.train.objective import Objective, cross_entropy, forward

_CHUNK = 2**24  # logits of each pass that are compared at a time


@dataclasses.dataclass(frozen=True)
class ThorConfig:
    """`alpha` weighs the consistency (the authors' run: 5; their default: 1)."""

    alpha: float = 5.0

    def validate(self, path: str) -> None:
        positive(self, path, "alpha", zero=True)


class Thor(Objective):
    """THOR: the next-token losses of two passes with independent draws, and a symmetric KL between the two."""

    Config = ThorConfig
    passes = 2

    def loss(self, model, batch, ostate, *, step, key, fraction):
        one, two = (
            forward(model, batch, train=True, step=step, key=jax.random.fold_in(key, number)) for number in (0, 1)
        )
        logits, auxes = zip(one, two)
        weights_BS = batch["loss_weights"]
        task = sum(jnp.sum(cross_entropy(z_BSV, batch["targets"]) * weights_BS) for z_BSV in logits)
        consistency = jnp.sum(symmetric_kl(*logits, weights_BS > 0) * weights_BS)
        router_loss = sum(aux.total_loss() for aux in auxes) * fraction
        scalars = {
            "loss": Stat.sum(task / 2),
            "router_loss": Stat.sum(router_loss / 2),
            "consistency": Stat.sum(consistency),
        }
        layers = merge_stats(auxes[0].stats, auxes[1].stats)
        return task + router_loss + self.config.alpha * consistency, {"scalars": scalars, "layers": layers}


def symmetric_kl(
    a_BSV: Float[Array, "B S V"], b_BSV: Float[Array, "B S V"], counts_BS: Array, chunk: int = _CHUNK
) -> Float[Array, "B S"]:
    """Half of KL(a || b) + KL(b || a) of the softmaxes of two logits, in nats and float32 or wider; 0 where `counts` is
    False.

    Computed for as many places of the sequences at a time as hold `chunk` logits, and again in the backward pass: of a
    large vocabulary's only the logits themselves and their gradients are whole.
    """

    @jax.checkpoint
    def part(xs):
        a_BCV, b_BCV, counts_BC = xs
        a_BCV, b_BCV = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (a_BCV, b_BCV))
        log_a, log_b = jax.nn.log_softmax(a_BCV), jax.nn.log_softmax(b_BCV)
        each = 0.5 * jnp.sum((jnp.exp(log_a) - jnp.exp(log_b)) * (log_a - log_b), axis=-1)
        return jnp.where(counts_BC, each, 0)

    B, S, V = a_BSV.shape
    C = max(c for c in range(1, S + 1) if S % c == 0 and (c == 1 or B * c * V <= chunk))
    if C == S:
        return part((a_BSV, b_BSV, counts_BS))
    # along the sequence: the batch lies spread over devices
    cut = lambda x: x.reshape(B, S // C, C, *x.shape[2:]).swapaxes(0, 1)
    parts_NBC = jax.lax.map(part, (cut(a_BSV), cut(b_BSV), cut(counts_BS)))
    return parts_NBC.swapaxes(0, 1).reshape(B, S)
