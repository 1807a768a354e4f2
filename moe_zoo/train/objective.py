"""What is minimised. The loop never asks which paper is running: it asks the objective."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_zoo.core.aux import Stat
from moe_zoo.core.registry import Registry

OBJECTIVES = Registry(
    "objective",
    {
        "adaptive_sparsity": "moe_zoo.train.adaptive_sparsity:AdaptiveSparsity",
        "answer_ratio": "moe_zoo.train.answer_ratio:AnswerRatio",
        "classification": "moe_zoo.train.classification:Classification",
        "distill": "moe_zoo.train.distill:Distill",
        "global_budget": "moe_zoo.train.global_budget:GlobalBudget",
        "next_token": "moe_zoo.train.objective:NextToken",
        "ponder": "moe_zoo.train.ponder:PonderLoss",
        "scheduled_loss": "moe_zoo.train.scheduled_loss:ScheduledLoss",
        "thor": "moe_zoo.train.thor:Thor",
        "token_budget": "moe_zoo.train.token_budget:TokenBudget",
    },
    base="moe_zoo.train.objective:Objective",
)


class Objective:
    """A loss with a state of its own (adaptive coefficients, controllers), updated once per optimizer step."""

    Config: ClassVar[type]
    #: what it learns from: as `batches` of the data
    batches: ClassVar[str] = "text"
    #: how often it runs the model, forward and backward, on every token: what a step costs
    passes: ClassVar[int] = 1

    def __init__(self, config):
        self.config = config

    def init_state(self) -> dict[str, Array]:
        """Arrays that are checkpointed with the run."""
        return {}

    def weighted(self, batch: dict[str, Array]) -> dict[str, Array]:
        """The batch of a whole step with `loss_weights`, which sum to 1, in the place of `loss_mask`."""
        batch = dict(batch)
        weights = batch.pop("loss_mask").astype(jnp.float32)
        batch["loss_weights"] = weights / jnp.maximum(weights.sum(), 1)
        return batch

    def loss(
        self, model, batch: dict[str, Array], ostate, *, step, key, fraction
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        """The loss of one micro-batch and its statistics `{"scalars": {name: Stat}, "layers": {path: {name: Stat}}}`.

        `batch["loss_weights"]` sum to 1 over the whole step, and `fraction` is this micro-batch's share of it: the sum
        of the micro-batches' losses is the loss of the step however it is cut. `batch["inputs"]`, if it is there: what
        losses ask to know of the step's other micro-batches (`train.accumulation`), for the model.
        """
        raise NotImplementedError(f"objective {type(self).__name__} does not define loss")

    def update(self, ostate, stats) -> dict[str, Array]:
        """The next state, given the statistics of the whole step."""
        return ostate


@dataclasses.dataclass(frozen=True)
class NextTokenConfig:
    """No settings: the coefficients of router losses belong to the model."""


class NextToken(Objective):
    """Cross-entropy of the next token plus the router losses of all layers."""

    Config = NextTokenConfig

    def loss(self, model, batch, ostate, *, step, key, fraction):
        logits, aux = forward(model, batch, train=True, step=step, key=key)
        nll_BS = cross_entropy(logits, batch["targets"])
        task = jnp.sum(nll_BS * batch["loss_weights"])
        extra, scalars = self.extra(aux, ostate)
        scalars |= {"loss": Stat.sum(task), "router_loss": Stat.sum(aux.total_loss() * fraction)}
        return task + (aux.total_loss() + extra) * fraction, {"scalars": scalars, "layers": aux.stats}

    def extra(self, aux, ostate) -> tuple[Float[Array, ""] | float, dict[str, Stat]]:
        """What a subclass adds to the loss of a micro-batch, and its statistics."""
        return 0.0, {}


def forward(model, batch: dict[str, Array], **kwargs):
    """Logits and Aux of a packed batch; rows' padding (segment 0) is invalid. Whoever decides for a whole document sees
    it up to the first token that the loss asks for.
    """
    if getattr(model, "reads_prompts", False):
        kwargs["prompt"] = prompts(batch)
    logits, aux, _ = model(
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        valid=batch["segment_ids"] > 0,
        domain=batch["domain"],
        inputs=batch.get("inputs"),
        **kwargs,
    )
    return logits, aux


def prompts(batch: dict[str, Array]) -> Bool[Array, "B S"]:
    """The tokens of each document that come before the first one that is trained on or scored."""
    asked_BS = batch["loss_weights"] > 0 if "loss_weights" in batch else batch["loss_mask"]
    before_BS = jnp.cumsum(asked_BS, axis=1) - asked_BS
    opens_BS = jnp.diff(batch["segment_ids"], axis=1, prepend=batch["segment_ids"][:, :1]) != 0
    return before_BS == jax.lax.cummax(jnp.where(opens_BS, before_BS, 0), axis=1)


def cross_entropy(logits_BSV: Float[Array, "B S V"], targets_BS: Array) -> Float[Array, "B S"]:
    """-log softmax(logits)[target], in nats."""
    at = jax.nn.logsumexp(logits_BSV, axis=-1)
    hit = jnp.where(targets_BS[..., None] == jnp.arange(logits_BSV.shape[-1]), logits_BSV, 0).sum(-1)
    return at - hit
