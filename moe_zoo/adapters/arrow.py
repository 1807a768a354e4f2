"""Arrow (Ostapenko et al., arXiv 2405.11157): routing among trained LoRAs that nobody trains.

    v_e: the input direction that expert e stretches most, the first singular vector of A_e B_e on the input side
    G = softmax over the K largest of |x v_e| / temperature

A singular vector's sign means nothing, hence the absolute value. `transform.load_adapters` brings the experts in and
makes v of them; nothing is left to train unless `freeze_experts` is off.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moe_zoo.adapters.routed import Routed, RoutedConfig, top_k_gates
from moe_zoo.core.param import Constant, Frozen, param
from moe_zoo.core.schema import positive
from moe_zoo.routing.router import check_experts_per_tok, linear_logits


@dataclasses.dataclass(frozen=True)
class ArrowConfig(RoutedConfig):
    """`num_experts_per_tok` K (PEFT: 3)."""

    freeze_experts: bool = True
    num_experts_per_tok: int = 3
    temperature: float = 1.0

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "num_experts_per_tok", "temperature")
        check_experts_per_tok(self.num_experts_per_tok, self.num_experts, path)


class Arrow(Routed):
    """Arrow: top-K of trained LoRAs by how far each one's first singular vector reaches into the token."""

    Config = ArrowConfig

    def add_router(self) -> None:
        E, _, D, _ = self.dims
        self.router = param((D, E), (self.linear.axes[0], "expert_logits"), Constant(0.0), kind=Frozen)

    def logits(self, x_TD, hidden_TER):
        return jnp.abs(linear_logits(x_TD, self.router[...])) / self.config.temperature

    def chosen(self, probs_TE, ctx):
        return top_k_gates(probs_TE, self.config.num_experts_per_tok, renormalise=True)

    def most_gates(self):
        return self.config.num_experts_per_tok

    def from_experts(self, a_ERD, b_ERN, scale_ER):
        directions = [direction(a_RD * s_R[:, None], b_RN) for a_RD, b_RN, s_R in zip(a_ERD, b_ERN, scale_ER)]
        return {"router": np.stack(directions, axis=1)}


def direction(a_RD: Float[np.ndarray, "R D"], b_RN: Float[np.ndarray, "R N"]) -> Float[np.ndarray, "D"]:
    """The first singular vector of A^T B on the side of D, of length 1; zero if there is no update."""
    if not (a_RD.any() and b_RN.any()):
        return np.zeros(a_RD.shape[1], np.float32)
    q_DR, left_RR = np.linalg.qr(a_RD.T.astype(np.float64))
    _, right_RR = np.linalg.qr(b_RN.T.astype(np.float64))
    u_RR, _, _ = np.linalg.svd(left_RR @ right_RR.T)
    return (q_DR @ u_RR[:, 0]).astype(np.float32)
