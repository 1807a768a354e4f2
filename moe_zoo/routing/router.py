"""The contract of a router."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moe_zoo.core.aux import Stat
from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join


@dataclasses.dataclass(frozen=True)
class Dims:
    """The sizes around a router. `num_heads`, `head_dim`: of the attention below it."""

    num_experts: int
    hidden_size: int
    vocab_size: int = 0
    num_heads: int = 0
    head_dim: int = 0


def check_experts_per_tok(K: float, num_experts: int, path: str) -> None:
    """Raises ConfigError if a token cannot have K of the experts; `path`: of the router's settings."""
    if K > num_experts:
        where = join(path, "num_experts_per_tok")
        raise ConfigError(f"{where}: {K} experts per token of num_experts={num_experts}; at most {num_experts}")


@dataclasses.dataclass(frozen=True)
class CostBound:
    """The most that a router may cost on a CPU, as multiples of top-k's CPU time in the same run of
    `scripts/bench.py routers`: `alone`, its `__call__`; `moved`, with its dispatcher and narrow experts.

    `why`: what costs more than the usual 1.5, where more is allowed.
    """

    alone: float = 1.5
    moved: float = 1.5
    why: str = ""


class Shared(nnx.Module):
    """What the routers of all layers of a model have in common: one module, handed to each as `ctx.shared`."""

    def before_layers(self, ctx: RoutingContext, cache: Any) -> tuple[Any, Any]:
        """(what the routers get as `ctx.shared`, the new cache): called once per forward, before the first layer. The
        module itself, unless there is something to compute ahead.
        """
        return self, None

    def init_cache(self, batch: int, max_seq: int) -> Any:
        """State of `before_layers` kept while decoding; None if a token needs nothing of earlier ones."""
        return None

    def flops_per_token(self, context: float) -> float:
        """Forward FLOPs of `before_layers` on one token that sees `context` keys on average."""
        return 0


class Router(nnx.Module):
    """Maps tokens to a `Decision`.

    A subclass declares `Config` (a frozen dataclass of its own settings), builds its parameters from `(config, dims)`,
    and implements `__call__`. It sees the global batch: collectives belong to the dispatcher. Router mathematics is
    float32. Padding (`ctx.valid` False) must change nothing for other tokens; decisions over tokens (`TokenChoice`,
    `Dense`) are masked by the layer, those that normalise or compete across tokens mask themselves.
    """

    Config: ClassVar[type]
    #: the type of its decisions; dispatchers and losses say which they take
    decision: ClassVar[type] = TokenChoice
    #: which of "logits" and "probs" its Routing has; losses say which they use
    provides: ClassVar[tuple[str, ...]] = ("logits", "probs")
    #: names of RoutingContext fields that must be there; checked when the model is built
    requires: ClassVar[tuple[str, ...]] = ()
    #: at inference, a token's decision depends on no later token of its sequence and on no other sequence
    causal: ClassVar[bool] = True
    #: it is trained on a finished model, whose other parameters are usually kept (`train.freeze`): no comparison of
    #: models that are trained from the start has it
    retrofits: ClassVar[bool] = False
    #: what the decision may cost beside top-k's
    cost: ClassVar[CostBound] = CostBound()

    num_experts: int

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        """The decision for every token, and what losses and analysis need. The one method a router must write."""
        raise NotImplementedError(f"router {type(self).__name__} does not define __call__")

    @classmethod
    def make_shared(cls, config: Any, dims: Dims) -> Shared | None:
        """The module that the routers of all layers share."""
        return None

    def init_carry(self, num_tokens: int) -> Any:
        """State handed from each MoE layer's router to the next, per token; None if depth does not matter."""
        return None

    def init_cache(self, batch: int, max_seq: int) -> Any:
        """State kept while decoding; None if a token needs nothing of earlier ones."""
        return None

    def from_corpus(self, counts_V: Int[np.ndarray, "V"], domains: Sequence[str]) -> dict[str, np.ndarray]:
        """New values of this layer's variables before the first step, given how often each token id is in the training
        data, and the names of its domains by their ids.
        """
        return {}

    def after_step(self, stats: dict[str, Stat]) -> dict[str, Array]:
        """New values of this layer's buffers after an optimizer step, given the layer's reduced statistics."""
        return {}

    def max_active(self) -> int:
        """Most experts a token can have."""
        return self.num_experts

    def active(self) -> float:
        """Experts per token to count in active parameters and FLOPs when no measurement is given."""
        return self.max_active()

    def rows_per_token(self, seq_len: int) -> float:
        """Expert rows to compute for each token of sequences of `seq_len`, when no measurement is given."""
        return self.active()

    def flops_per_token(self, hidden_size: int) -> float:
        """Forward FLOPs of deciding on one token, multiply-adds counting two; by default x W."""
        return 2 * hidden_size * self.num_experts

    def context_flops(self, context: float) -> float:
        """The same of looking at `context` tokens of its sequence on average; a router that looks at none has none."""
        return 0.0


def at_least_f32(x: Array) -> Array:
    """Router mathematics never runs below float32; float64 (used by equality tests) stays float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def linear_logits(x_TD: Float[Array, "T D"], w_DE: Float[Array, "D E"]) -> Float[Array, "T E"]:
    """`x @ w` in float32 or wider, whatever the compute dtype (Switch, arXiv 2101.03961, section 2.4)."""
    return at_least_f32(x_TD) @ at_least_f32(w_DE)


def gather_gates(scores_TE: Float[Array, "T E"], experts_TK: Int[Array, "T K"]) -> Float[Array, "T K"]:
    """`scores[t, experts[t, k]]`, 0 where the expert is E.

    An indexed gather on a CPU, where it takes a third of the time for K = 2 and a twentieth for K = E = 64. Elsewhere
    compare-and-sum: the backward pass of an indexed gather is a scatter-add, slow on a TPU.
    """
    return jax.lax.platform_dependent(scores_TE, experts_TK, cpu=_take, default=_compare_and_sum)


def _take(scores_TE, experts_TK):
    return jnp.take_along_axis(scores_TE, experts_TK, axis=-1, mode="fill", fill_value=0)


def _compare_and_sum(scores_TE, experts_TK):
    hit_TKE = experts_TK[..., None] == jnp.arange(scores_TE.shape[-1])
    return jnp.where(hit_TKE, scores_TE[:, None, :], 0).sum(-1)
