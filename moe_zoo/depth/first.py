"""FiRST (arXiv 2410.12513): a gate per layer of a frozen model learns which layers a sequence can do without.

    rho_j = sigmoid(x_j . w + b)
    training:    x_j + rho_j (block(x)_j - x_j),   loss + alpha mean_j rho_j + lambda ||w||^2 of every layer
    inference:   the sequence goes through if the mean of rho over its prompt is at least 1/2, all of it or nothing

What training mixes token by token inference decides for the sequence. The second phase is LoRA beside the frozen model
and its frozen gates, which then decide as they do at inference.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.param import Constant, Normal, param
from moe_zoo.core.schema import positive
from moe_zoo.depth.selector import Selection
from moe_zoo.depth.sequence import Documents, SequenceSelector
from moe_zoo.routing.router import at_least_f32


@dataclasses.dataclass(frozen=True)
class FirstConfig:
    """`alpha`: what a token pays for each layer that it goes through. `l2`: lambda. `init_bias`: where b begins, None:
    there is none, as in the paper, and the model begins with gates of 1/2. `vote`: by the mean of the prompt's gates,
    or by how many of them are at least 1/2 ("majority").
    """

    alpha: float = 0.01
    l2: float = 0.01
    init_std: float = 0.02
    init_bias: float | None = 2.0
    vote: Literal["mean", "majority"] = "mean"

    def validate(self, path: str) -> None:
        positive(self, path, "alpha", "l2", "init_std", zero=True)


class First(SequenceSelector):
    """FiRST: gates that mix softly in training, and at inference skip the block for a whole sequence by its prompt."""

    Config = FirstConfig

    def __init__(self, config: FirstConfig, hidden_size: int):
        super().__init__(config, hidden_size)
        self.kernel = param((hidden_size,), ("embed",), Normal(config.init_std))
        if config.init_bias is not None:
            self.bias = param((), (), Constant(config.init_bias))

    def gates(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S"]:
        """rho of every token."""
        logits_BS = at_least_f32(x_BSD) @ at_least_f32(self.kernel[...])
        if self.config.init_bias is not None:
            logits_BS = logits_BS + at_least_f32(self.bias[...])
        return jax.nn.sigmoid(logits_BS)

    def decide(self, x_BSD: Float[Array, "B S D"], documents: Documents, ctx) -> Int[Array, "B S"]:
        said_BS = self.gates(x_BSD)
        if self.config.vote == "majority":
            said_BS = (said_BS >= 0.5).astype(said_BS.dtype)
        total_BS = documents.sums(jnp.where(documents.prompt, said_BS, 0))
        return (total_BS >= 0.5 * documents.sums(documents.prompt.astype(said_BS.dtype))).astype(jnp.int32)

    def learning(self, x_BSD, given_B, ctx: RoutingContext) -> Selection | None:
        """All go through, and the gates weight what the block adds; a path that is given has nothing to teach."""
        if given_B is not None:
            return None
        gates_BS = self.gates(x_BSD)
        valid_BS = jnp.ones(gates_BS.shape, bool) if ctx.valid is None else ctx.valid.reshape(gates_BS.shape)
        total, count = jnp.where(valid_BS, gates_BS, 0).sum(), valid_BS.sum().astype(jnp.float32)
        penalty = self.config.l2 * jnp.square(at_least_f32(self.kernel[...])).sum()
        aux = Aux(
            losses={"depth_gates": self.config.alpha * total / jnp.maximum(count, 1), "depth_l2": penalty},
            stats={"depth_gate": Stat.mean(jax.lax.stop_gradient(total), count)},
        )
        return Selection(None, jnp.ones(gates_BS.shape, bool), gates_BS, aux=aux)

    def flops_per_token(self) -> float:
        return 2 * self.hidden_size
