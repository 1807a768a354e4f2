"""MixLoRA (Li et al., arXiv 2404.15159): experts that are the whole feed-forward network, each with LoRAs of its own.

    p = softmax(x W_g), the K best, renormalised to g;   y = sum_e g_e FFN_e(x)
    FFN_e: the frozen network with a LoRA beside each of its matrices

One router per block; the attention's linear layers have one plain LoRA each. The activation is inside an expert, so
this is no sum of low-rank updates. But the base's matrices are common to all experts: their first products are made
once, and the last is linear, so of the experts' hidden layers h_e only the mixture goes through it:

    y = (sum_e g_e h_e) W_down + sum_e g_e s (h_e A_e) B_e

Balance, once per block: coef E sum_k sum_e f_ke P_e, as in Mixtral: K at uniform.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_zoo.adapters.adapter import Adapter
from moe_zoo.adapters.routed import balance, gate_stats, top_k_gates
from moe_zoo.adapters.targets import AdapterConfig, Linear
from moe_zoo.core.aux import Aux
from moe_zoo.core.param import Normal, param
from moe_zoo.core.schema import positive
from moe_zoo.routing.router import check_experts_per_tok, linear_logits


@dataclasses.dataclass(frozen=True)
class MixLoraConfig(AdapterConfig):
    """`num_experts` networks, `num_experts_per_tok` of them for a token. `target_modules` of the feed-forward part get
    a LoRA for each expert; a block's router is there if `ffn.w_up` is one.
    """

    target_modules: tuple[str, ...] = ("mixer.*", "ffn.*")
    num_experts: int = 8
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.001
    init_std: float = 0.02

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "num_experts", "num_experts_per_tok", "init_std")
        positive(self, path, "router_aux_loss_coef", zero=True)
        check_experts_per_tok(self.num_experts_per_tok, self.num_experts, path)

    def experts(self, name: str, num_layers: int) -> int:
        return self.num_experts if ".ffn.w_" in name else 1


class MixLora(Adapter):
    """MixLoRA: top-K whole feed-forward experts that share the frozen one, a plain LoRA beside attention."""

    Config = MixLoraConfig
    takes_loras = False

    def __init__(self, config: MixLoraConfig, linear: Linear):
        super().__init__(config, linear)
        if linear.name == "ffn.w_up":
            axes = (linear.axes[0], "expert_logits")
            self.router = param((linear.in_features, self.num_experts), axes, Normal(config.init_std))

    @classmethod
    def feed_forward(cls, mlp, x, tapped):
        gate, up, down = (tapped.adapters.get(f"ffn.w_{name}") for name in ("gate", "up", "down"))
        if up is None:
            return super().feed_forward(mlp, x, tapped)
        x_TD = x.reshape(-1, x.shape[-1])
        gates_TE = up.route(x_TD, tapped)
        seen_TD = up.dropped(x_TD, tapped.ctx)
        gate_TF, up_TF, *linear = mlp.first(x_TD)
        mixed_TF, delta_TD = jnp.zeros_like(up_TF), jnp.zeros_like(x_TD)
        for e in range(up.num_experts):
            own_TF = gate_TF if gate_TF is None or gate is None else gate_TF + gate.update(seen_TD, e)
            h_TF = mlp.config.hidden(own_TF, up_TF + up.update(seen_TD, e), *linear)
            g_T1 = gates_TE[:, e : e + 1].astype(h_TF.dtype)
            mixed_TF += g_T1 * h_TF
            if down is not None:
                delta_TD += g_T1 * down.update(down.dropped(h_TF, tapped.ctx), e)
        return (mlp.last(mixed_TF) + delta_TD).reshape(x.shape)

    def update(self, x_TD, e: int):
        """s_e (x A_e) B_e of one expert."""
        a_RD, b_RN, scale_R = (p[...][e].astype(x_TD.dtype) for p in (self.a, self.b, self.scale))
        return ((x_TD @ a_RD.T) * scale_R) @ b_RN

    def route(self, x_TD, tapped):
        """g, with what there is to say of it said."""
        ctx, c = tapped.ctx, self.config
        probs_TE = jax.nn.softmax(linear_logits(x_TD, self.router[...]))
        gates_TE = top_k_gates(probs_TE, c.num_experts_per_tok, renormalise=True)
        # a layer that is no target has experts that are all the base
        on = (self.scale[...] != 0).any().astype(jnp.float32)
        raw = c.num_experts_per_tok * balance(probs_TE, gates_TE, jnp.ones(self.num_experts, bool), ctx)
        losses = {"adapter_balance": on * c.router_aux_loss_coef * raw} if c.router_aux_loss_coef else {}
        tapped.said.append(Aux(losses=losses, stats=gate_stats(gates_TE, probs_TE, ctx, on)))
        return gates_TE

    def idle_parameters(self) -> int:
        idle = super().idle_parameters()
        if hasattr(self, "router"):
            layers = (self.config.scales(self.linear) == 0).all((1, 2))
            idle += int(layers.sum()) * self.linear.in_features * self.num_experts
        return idle
