"""MoLE (Wu et al., arXiv 2404.13628): trained LoRAs stay as they are, a gate that looks at their outputs mixes them.

    O_t = [Delta_1(x_t), ..., Delta_E(x_t)] flattened and normed;  G_t = softmax(O_t W / tau)

    L = -sum_e log(mean_t G_te) / E        the gating balance loss, against a gate that settles on one expert

The paper's gate looks at all tokens of a sequence of fixed length at once; here each token's looks at its own outputs,
so that text can be generated. Experts are one LoRA each: `transform.load_adapters` brings them in; `freeze_experts`
is true by default.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.adapters.adapter import Adapter
from moe_zoo.adapters.routed import Routed, RoutedConfig, mean_over_valid
from moe_zoo.core.param import Constant, param
from moe_zoo.core.schema import positive
from moe_zoo.routing.router import at_least_f32


@dataclasses.dataclass(frozen=True)
class MoleConfig(RoutedConfig):
    """`router_aux_loss_coef` weighs the balance. The temperature tau is trained, and begins at `temperature`."""

    freeze_experts: bool = True
    temperature: float = 1.0
    router_aux_loss_coef: float = 0.01

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "temperature")
        positive(self, path, "router_aux_loss_coef", zero=True)


class Mole(Routed):
    """MoLE: frozen LoRAs, mixed by a gate over their normed outputs."""

    Config = MoleConfig
    reads_hidden = True

    def add_router(self) -> None:
        E, _, _, N = self.dims
        self.router = param((E, N, E), ("adapter", self.linear.axes[1], "expert_logits"), Constant(0.0))
        self.log_temperature = param((1,), (None,), Constant(math.log(self.config.temperature)))

    def logits(self, x_TD, hidden_TER):
        # outputs o_e = h_e B_e are E N numbers for each token; the two things that are asked of them need E R
        h_TER, b_ERN = at_least_f32(hidden_TER), at_least_f32(self.b[...])
        square_T = jnp.einsum("ter,ers,tes->t", h_TER, jnp.einsum("ern,esn->ers", b_ERN, b_ERN), h_TER)
        logits_TE = jnp.einsum("ter,erf->tf", h_TER, jnp.einsum("ern,enf->erf", b_ERN, self.router[...]))
        return logits_TE * over_length(square_T, b_ERN.shape[-1])[:, None] / jnp.exp(self.log_temperature[...])

    def losses(self, probs_TE, gates_TE, ctx):
        if not self.config.router_aux_loss_coef:
            return {}
        mean_E = jax.vmap(lambda gates_T: mean_over_valid(gates_T, ctx), in_axes=1)(gates_TE)
        live_E = self.live()
        even = -jnp.where(live_E, jnp.log(jnp.maximum(mean_E, 1e-20)), 0).sum() / jnp.maximum(live_E.sum(), 1)
        return {"balance": self.config.router_aux_loss_coef * even}

    def idle_parameters(self) -> int:
        E, _, _, N = self.dims
        idle_LE = (self.config.scales(self.linear) == 0).all(-1)
        return Adapter.idle_parameters(self) + int(idle_LE.sum()) * N * E

    def flops_per_token(self) -> int:
        E, R, D, _ = self.dims
        return super().flops_per_token() + 2 * E * R * (R + E + 1) - 2 * D * E


def over_length(square_T: Float[Array, "T"], N: int) -> Float[Array, "T"]:
    """What brings outputs, of all experts together, to length sqrt(N), given their squared length; zero stays zero."""
    return jax.lax.rsqrt(jnp.maximum(square_T, 1e-12) / N)
