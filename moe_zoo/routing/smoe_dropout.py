"""SMoE-Dropout (Chen et al., arXiv 2303.01610): a random, frozen router, and more and more experts while training.

    z = x W_r + b_r (never updated);  experts = TopK(z, k);  gates = softmax over the k selected logits
    k(step) = round((k_max - k_min) * step / total_steps) + k_min

Gates still depend on x, so gradient flows through them into x: only the parameters are frozen, outside the optimizer,
where no weight decay reaches them. k is read from the step inside one compiled program: ranks beyond k go nowhere and
cost no rows. The trained model runs at any k (`eval_experts_per_tok`).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.param import Constant, Frozen, Normal, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.routing.router import CostBound, Dims, Router, at_least_f32, gather_gates, linear_logits
from moe_zoo.routing.top_k import select


@dataclasses.dataclass(frozen=True)
class SMoEDropoutConfig:
    """`k_min` and `k_max` None: E/2 and E. `total_steps`: when k_max is reached. `eval_experts_per_tok` None: k_max."""

    k_min: int | None = None
    k_max: int | None = None
    total_steps: int = 1000
    eval_experts_per_tok: int | None = None
    init_std: float = 0.02

    def validate(self, path: str) -> None:
        positive(self, path, "k_min", "k_max", "total_steps", "eval_experts_per_tok", "init_std")

    def validate_for(self, num_experts: int, path: str) -> None:
        """What can only be checked once the bank's size is known."""
        low, high = self.bounds(num_experts)
        if not low <= high <= num_experts:
            raise ConfigError(
                f"{join(path, 'k_max')}: expected k_min={low} <= k_max={high} <= num_experts={num_experts}"
            )
        k = self.eval_experts_per_tok
        if k is not None and k > num_experts:
            raise ConfigError(
                f"{join(path, 'eval_experts_per_tok')}: {k} of num_experts={num_experts}; at most {num_experts}"
            )

    def bounds(self, num_experts: int) -> tuple[int, int]:
        """(k_min, k_max)."""
        return self.k_min or max(1, num_experts // 2), self.k_max or num_experts


class SMoEDropout(Router):
    """A frozen random router whose number of experts grows with the step; runs at any number afterwards."""

    Config = SMoEDropoutConfig
    requires = ("step",)
    cost = CostBound(12, 40, "up to all E experts for every token, sorted and moved")

    def __init__(self, config: SMoEDropoutConfig, dims: Dims):
        self.config, self.num_experts = config, dims.num_experts
        D, E = dims.hidden_size, dims.num_experts
        self.kernel = param((D, E), ("embed", "expert_logits"), Normal(config.init_std), kind=Frozen)
        self.bias = param((E,), ("expert_logits",), Constant(0.0), kind=Frozen)

    def k(self, ctx: RoutingContext) -> Int[Array, ""] | int:
        """Experts per token at this step of training, or of evaluation."""
        low, high = self.config.bounds(self.num_experts)
        if not ctx.train:
            return self.config.eval_experts_per_tok or high
        rises = jnp.asarray(first_steps(high - low, self.config.total_steps), jnp.int32)
        return low + (ctx.step >= rises).sum(dtype=jnp.int32)

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        logits_TE = linear_logits(x_TD, self.kernel[...]) + at_least_f32(self.bias[...])
        K, k = self.max_active(), self.k(ctx)
        experts_TK = select(logits_TE, K, ctx.inputs.get("router_bias"))
        chosen_TK = gather_gates(logits_TE, experts_TK)
        on_K = jnp.arange(K) < k
        gates_TK = jax.nn.softmax(jnp.where(on_K, chosen_TK, -jnp.inf), axis=-1)
        experts_TK = jnp.where(on_K, experts_TK, self.num_experts)
        return Routing(TokenChoice(experts_TK, gates_TK, self.num_experts), logits_TE, jax.nn.softmax(logits_TE))

    def rows_per_token(self, seq_len: int) -> float:
        """The mean over training."""
        return sum(self.config.bounds(self.num_experts)) / 2

    def max_active(self) -> int:
        return max(self.config.bounds(self.num_experts)[1], self.config.eval_experts_per_tok or 0)


def first_steps(rises: int, total: int) -> list[int]:
    """The steps at which round(rises * step / total), halves to even, first reaches 1, 2, ..., `rises`.

    In integers: a float32 product misses the halves.
    """
    doubled = [(2 * j - 1) * total for j in range(1, rises + 1)]  # j is reached where 2 * rises * step gets here
    late = [j % 2 == 1 and at % (2 * rises) == 0 for j, at in enumerate(doubled, 1)]  # a half below an odd j is j - 1
    return [-(-at // (2 * rises)) + wait for at, wait in zip(doubled, late, strict=True)]
