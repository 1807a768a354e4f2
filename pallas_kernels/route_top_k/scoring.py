"""What all implementations share: settings, scores, the order of selection, gates.

Dims: T tokens, E experts, K experts per token.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _checks

ScoreFunction = Literal["softmax", "sigmoid"]
Priority = Literal["token", "choice"]
SCORE_FUNCTIONS = ("softmax", "sigmoid")
PRIORITIES = ("token", "choice")

#: added to the sum that gates are divided by: sigmoid scores may all underflow
EPSILON = 1e-20


@dataclasses.dataclass(frozen=True)
class Settings:
    """The static arguments of route_top_k."""

    k: int
    score_function: ScoreFunction
    renormalize: bool
    scale: float
    priority: Priority
    return_scores: bool


def scores(logits_TE: Float[Array, "T E"], score_function: ScoreFunction) -> Float[Array, "T E"]:
    """In float32 at least."""
    logits_TE = logits_TE.astype(_checks.accumulator(logits_TE.dtype))
    return jax.nn.sigmoid(logits_TE) if score_function == "sigmoid" else jax.nn.softmax(logits_TE)


def selection_key(scores_TE: Float[Array, "T E"], bias_E: Float[Array, " E"] | None) -> Float[Array, "T E"]:
    """scores + bias, where NaN counts as the least finite number, and so does -inf: below it there is only "taken"."""
    key_TE = jax.lax.stop_gradient(scores_TE if bias_E is None else scores_TE + bias_E.astype(scores_TE.dtype))
    least = jnp.finfo(key_TE.dtype).min
    return jnp.where(jnp.isnan(key_TE), least, jnp.maximum(key_TE, least))


def gates(scores_TE: Float[Array, "T E"], experts_TK: Int[Array, "T K"], settings: Settings) -> Float[Array, "T K"]:
    """The chosen scores, renormalised and scaled as the settings say; 0 where the expert is E.

    Compares and sums: the derivative of an indexed gather would be a scatter-add, slow on every platform.
    """
    hit_TKE = experts_TK[..., None] == jnp.arange(scores_TE.shape[-1], dtype=experts_TK.dtype)
    gates_TK = jnp.where(hit_TKE, scores_TE[:, None, :], 0).sum(-1)
    if settings.renormalize:
        gates_TK = gates_TK / (gates_TK.sum(-1, keepdims=True) + EPSILON)
    return gates_TK * settings.scale
