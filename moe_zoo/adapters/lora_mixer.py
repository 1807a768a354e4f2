"""LoRA-Mixer (arXiv 2507.00029): LoRAs for tasks, trained by their labels, then a router with an entropy loss.

    p = softmax(x W_g);   y = y0 + sum_e G_te s_e (x_t A_e) B_e, the output of the projection itself
    routing  "task"       G = one-hot of the task: all experts train in one run, each on its own examples
             "soft"       G = p
             "hard_soft"  G = the K largest p, renormalised, on the way forward and p on the way back
    at inference the K largest, renormalised, unless `routing` is "task" and the task is known

    L = alpha_b sum_e P_e f_e + entropy_coef * mean_t H(p_t)

The paper prints -lambda H, which makes gates flat, and says that they become peaked: `entropy_coef` has a sign,
negative for the printed loss and positive for peaked gates. Router sharing, router input and the hard-soft rule are
open in the paper; here each linear layer has a router of its own on its own input. There is no preservation term:
experts that should stay are frozen (`freeze_experts`); `transform.load_adapters` brings in those of others.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from moe_zoo.adapters.routed import Routed, RoutedConfig, balance, top_k_gates
from moe_zoo.core.schema import positive
from moe_zoo.losses.entropy_loss import entropy
from moe_zoo.routing.router import check_experts_per_tok


@dataclasses.dataclass(frozen=True)
class LoraMixerConfig(RoutedConfig):
    """`num_experts_per_tok` K at inference (paper: 3). `balance_coef` is alpha_b, without the usual factor E."""

    routing: Literal["task", "soft", "hard_soft"] = "soft"
    num_experts_per_tok: int = 3
    balance_coef: float = 0.01
    entropy_coef: float = -0.001

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "num_experts_per_tok")
        positive(self, path, "balance_coef", zero=True)
        check_experts_per_tok(self.num_experts_per_tok, self.num_experts, path)


class LoraMixer(Routed):
    """LoRA-Mixer: an expert per task, then soft routing in training and top-K at inference, with an entropy term."""

    Config = LoraMixerConfig

    def chosen(self, probs_TE, ctx):
        c = self.config
        if c.routing == "soft" and ctx.train:
            return probs_TE
        top_TE = top_k_gates(probs_TE, c.num_experts_per_tok, renormalise=True)
        if c.routing == "hard_soft":
            return jax.lax.stop_gradient(top_TE - probs_TE) + probs_TE
        if c.routing == "task" and ctx.domain is not None:
            known_T1 = ((ctx.domain >= 0) & (ctx.domain < self.num_experts))[:, None]
            return jnp.where(known_T1, jax.nn.one_hot(ctx.domain, self.num_experts), top_TE)
        return top_TE

    def most_gates(self):
        return self.config.num_experts_per_tok if self.config.routing == "task" else None

    def losses(self, probs_TE, gates_TE, ctx):
        c = self.config
        if c.routing == "task":
            return {}
        top_TE = top_k_gates(probs_TE, c.num_experts_per_tok, renormalise=True)
        even = balance(probs_TE, top_TE, self.live(), ctx) / jnp.maximum(self.live().sum(), 1)
        return {"balance": c.balance_coef * even, "entropy": c.entropy_coef * entropy(probs_TE, ctx.valid)}
