"""MoGU's loss of a responder (Du et al., NeurIPS 2024): one answer's loss over that of another to the same prompt.

    L = mean over pairs of CE(wanted) / CE(other),   CE the mean over an answer's tokens and its end

The data has pairs: records with `prompt`, `answer` and `rejected`; both answers lie one after the other in a row.
`prefer` says which of the two is wanted: a responder that complies is trained on prompts where compliance is rejected,
and one that refuses on those where refusal is, which `domains` picks.

L is bounded by 0 and still falls when the other answer's loss grows without end: the authors take the responders of a
fixed early step.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_zoo.core.aux import Stat
from moe_zoo.core.registry import ConfigError
from moe_zoo.train.objective import Objective, cross_entropy, forward

_LEAST = 1e-6  # of the other answer's loss, which divides


@dataclasses.dataclass(frozen=True)
class AnswerRatioConfig:
    """`prefer`: which answer of a record is wanted. `domains`: ids of the domains whose pairs count; empty: all."""

    prefer: Literal["answer", "rejected"] = "answer"
    domains: tuple[int, ...] = ()


class AnswerRatio(Objective):
    """The mean ratio of the wanted answer's loss to the other's, plus the router losses of all layers."""

    Config = AnswerRatioConfig

    def weighted(self, batch):
        """`loss_weights` of the wanted answers' tokens: all tokens of a pair weigh alike, and all pairs of the step.
        `other`: which targets are of the other answers.
        """
        batch = dict(batch)
        answer_BS = batch.pop("loss_mask")
        rejected_BS = batch.pop("rejected_mask", None)
        if rejected_BS is None:
            raise ConfigError(
                "train.objective: 'answer_ratio' compares two answers to a prompt, and the data has one: expected "
                "records with 'prompt', 'answer' and 'rejected'"
            )
        wanted, other = (answer_BS, rejected_BS) if self.config.prefer == "answer" else (rejected_BS, answer_BS)
        if self.config.domains:
            chosen_BS = jnp.isin(batch["domain"], jnp.asarray(self.config.domains))
            wanted, other = wanted & chosen_BS, other & chosen_BS
        pairs_BS = pair_of(batch["segment_ids"])
        lengths_BP, others_BP = (sum_by_pair(mask.astype(jnp.float32), pairs_BS) for mask in (wanted, other))
        both_BP = (lengths_BP > 0) & (others_BP > 0)  # a row may end within a pair
        share_BP = jnp.where(both_BP, 1 / jnp.maximum(lengths_BP, 1), 0) / jnp.maximum(both_BP.sum(), 1)
        weights_BS = jnp.where(wanted, jnp.take_along_axis(share_BP, pairs_BS, axis=1), 0)
        return batch | {"loss_weights": weights_BS, "other": other}

    def loss(self, model, batch, ostate, *, step, key, fraction):
        logits, aux = forward(model, batch, train=True, step=step, key=key)
        nll_BS, weights_BS, other_BS = cross_entropy(logits, batch["targets"]), batch["loss_weights"], batch["other"]
        pairs_BS = pair_of(batch["segment_ids"])
        tokens_BP = sum_by_pair(other_BS.astype(jnp.float32), pairs_BS)
        other_BP = sum_by_pair(jnp.where(other_BS, nll_BS, 0), pairs_BS) / jnp.maximum(tokens_BP, 1)
        other_BS = jnp.take_along_axis(jnp.maximum(other_BP, _LEAST), pairs_BS, axis=1)
        # of a pair's tokens the weights are equal, so this is the mean over pairs of both means' ratio
        ratio = jnp.sum(weights_BS * nll_BS / other_BS)
        scalars = {
            "loss": Stat.sum(jnp.sum(weights_BS * nll_BS)),
            "other_loss": Stat.sum(jnp.sum(weights_BS * other_BS)),
            "answer_ratio": Stat.sum(ratio),
            "router_loss": Stat.sum(aux.total_loss() * fraction),
        }
        return ratio + aux.total_loss() * fraction, {"scalars": scalars, "layers": aux.stats}


def pair_of(segments_BS: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """The pair of documents that each place of a row belongs to, 1, 2, ... as `data.PackedSource` numbers them; 0 is
    padding.
    """
    return segments_BS // 2


def sum_by_pair(values_BS: Float[Array, "B S"], pairs_BS: Int[Array, "B S"]) -> Float[Array, "B P"]:
    """Sums over the places of each pair of a row."""
    S = values_BS.shape[1]
    return jax.vmap(lambda values_S, pairs_S: jax.ops.segment_sum(values_S, pairs_S, S + 2))(values_BS, pairs_BS)
