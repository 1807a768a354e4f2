"""SMoRA (Zhao et al., arXiv 2501.15103): every rank of one LoRA is an expert, a token uses K of them.

    q = sigmoid(x W_r) + b;  S = the K largest q;  G_i = K q_i / sum_S q;  y = y0 + alpha / K * ((x A) * G) B

b moves by `bias_update_rate` against the load once per step, with no gradient; there is no loss. As in the authors'
code b is in the weights, too; `bias_in_weight=false` is loss-free balancing as DeepSeek has it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moe_zoo.adapters.routed import Routed, gate_stats, largest
from moe_zoo.adapters.targets import AdapterConfig
from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.param import Buffer, Constant, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.routing.router import linear_logits


@dataclasses.dataclass(frozen=True)
class SmoraConfig(AdapterConfig):
    """`r` ranks, each an expert, `num_experts_per_tok` of them for a token. The authors' u is 1e-5 over many steps."""

    r: int = 64
    num_experts_per_tok: int = 8
    bias_update_rate: float = 1e-5
    bias_in_weight: bool = True
    freeze_experts: bool = False

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "num_experts_per_tok")
        positive(self, path, "bias_update_rate", zero=True)
        if self.num_experts_per_tok > self.r:
            raise ConfigError(f"{join(path, 'num_experts_per_tok')}: {self.num_experts_per_tok} of r={self.r} ranks")
        if self.use_rslora or self.rank_pattern:
            raise ConfigError(f"{path}: the scale is lora_alpha / num_experts_per_tok and r the same everywhere")

    def experts(self, name: str, num_layers: int) -> int:
        return self.r

    def rank(self, name: str) -> int:
        return 1

    def scaling(self, name: str) -> float:
        return super().scaling(name) / self.num_experts_per_tok


class Smora(Routed):
    """SMoRA: K of a LoRA's ranks for each token, sigmoid scores, balanced by a bias."""

    Config = SmoraConfig
    takes_loras = False

    def add_router(self) -> None:
        super().add_router()
        self.bias = param((self.num_experts,), ("expert_logits",), Constant(0.0), kind=Buffer)

    def gate(self, x_TD, hidden_TER, ctx):
        c = self.config
        scores_TE = jax.nn.sigmoid(linear_logits(x_TD, self.router[...]))
        biased_TE = scores_TE + self.bias[...]
        kept_TE = largest(biased_TE, c.num_experts_per_tok)
        # far below zero a bias would turn a weight's sign
        weight_TE = jnp.where(kept_TE, jnp.maximum(biased_TE if c.bias_in_weight else scores_TE, 0), 0)
        gates_TE = c.num_experts_per_tok * weight_TE / (weight_TE.sum(-1, keepdims=True) + 1e-20)
        counted_TE = kept_TE if ctx.valid is None else kept_TE & ctx.valid[:, None]
        on = self.live().any().astype(jnp.float32)
        stats = gate_stats(gates_TE, scores_TE / scores_TE.sum(-1, keepdims=True), ctx, on)
        stats[f"{self.linear.name}/counts"] = Stat.sum(counted_TE.sum(0).astype(jnp.float32))
        return gates_TE, Aux(stats=stats)

    def most_gates(self):
        return self.config.num_experts_per_tok

    def after_step(self, stats: dict[str, Stat]) -> dict[str, Array]:
        load_E = stats[f"{self.linear.name}/counts"].value()
        return {"bias": self.bias[...] + self.config.bias_update_rate * jnp.sign(load_E.mean() - load_E)}
