"""GLIDER (Li et al., arXiv 2410.07172): PHATGOOSE's router, which sees tokens, told what the whole sequence asks for.

    l = LN(x) LN(v_e) / sqrt(D)                     PHATGOOSE's scores, by token and layer
    c_e = cos(q, g_e)                               q, g_e: embeddings of the sequence's and of expert e's instruction
    z = l + kappa c,   kappa = beta + gamma [max_e c_e >= threshold]
    G = softmax(z) over all, the K best, renormalised

One c for all tokens and layers of a sequence: close to a known task its expert wins everywhere, else l decides. Nothing
trains. `transform.describe_experts` gives g, a call of the model or of `generate` q; without q the router is
PHATGOOSE's.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.adapters.phatgoose import Phatgoose, PhatgooseConfig
from moe_zoo.adapters.shared import SharedAdapters
from moe_zoo.core.param import Constant, Frozen, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.routing.router import at_least_f32


@dataclasses.dataclass(frozen=True)
class GliderConfig(PhatgooseConfig):
    """`embedding_size` M of instructions. `kappa`: a fixed one instead of the rule's, 100 or 3 in the authors' runs; at
    0 this is PHATGOOSE. `threshold` is a matter of the embedding.
    """

    num_experts: int = 4
    stage: Literal["gate", "route"] = "route"
    embedding_size: int = 512
    gamma: float = 100.0
    threshold: float = 0.8
    beta: float = 3.0
    kappa: float | None = None

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "embedding_size")
        for name in ("gamma", "beta", "kappa"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{join(path, name)}: expected a number >= 0, got {value}")


class Likeness(SharedAdapters):
    """How much what a sequence asks for is like what each expert is for."""

    def __init__(self, config: GliderConfig):
        self.config, self.instruction_size = config, config.embedding_size
        shape = (config.num_experts, config.embedding_size)
        self.embeddings = param(shape, ("expert_logits", None), Constant(0.0), kind=Frozen)

    def first(self, instructions: Float[Array, "B M"] | None) -> Float[Array, "B E"] | None:
        """kappa c, what is added to the logits of all tokens of a sequence."""
        if instructions is None:
            return None
        c, cosine_BE = self.config, cosine(at_least_f32(instructions), at_least_f32(self.embeddings[...]))
        if c.kappa is not None:
            return c.kappa * cosine_BE
        known_B1 = cosine_BE.max(-1, keepdims=True) >= c.threshold
        return (c.beta + c.gamma * known_B1) * cosine_BE


class Glider(Phatgoose):
    """GLIDER: PHATGOOSE's gates, and how much the instruction is like each expert's."""

    Config = GliderConfig

    @classmethod
    def make_shared(cls, config, linears, *, num_layers, hidden_size):
        return Likeness(config) if config.stage == "route" else None

    def informed(self, logits_TE, ctx):
        bias_BE = ctx.shared["adapters"]
        return logits_TE if bias_BE is None else logits_TE + jnp.repeat(bias_BE, ctx.seq, axis=0)


def cosine(x: Float[Array, "B M"], y: Float[Array, "E M"]) -> Float[Array, "B E"]:
    """Of the angle between each pair of rows; 0 beside a row of zeros."""
    lengths = jnp.linalg.norm(x, axis=-1)[:, None] * jnp.linalg.norm(y, axis=-1)
    return x @ y.T / jnp.maximum(lengths, 1e-8)
