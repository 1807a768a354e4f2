"""MoLA (Gao et al., arXiv 2402.08562): the K best of a layer's experts, and more experts in the layers that need more.

    G = the K largest of softmax(x W_g), renormalised;  L = E_l sum_e f_e P_e per linear layer

f counts all K T choices, so L is 1 at uniform. The paper's best of four shapes gives the upper layers more experts.
"""

import dataclasses

from moe_zoo.adapters.routed import Routed, RoutedConfig, balance, top_k_gates
from moe_zoo.adapters.targets import layer_of
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive


@dataclasses.dataclass(frozen=True)
class MolaConfig(RoutedConfig):
    """`experts_by_depth`: experts per layer in equal parts of the depth, from below; the paper's are (2, 4, 6, 8),
    (8, 6, 4, 2), (5, 5, 5, 5) and (8, 2, 2, 8); empty: `num_experts` everywhere. `router_aux_loss_coef` weighs the
    balance.
    """

    num_experts_per_tok: int = 2
    experts_by_depth: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "num_experts_per_tok")
        positive(self, path, "router_aux_loss_coef", zero=True)
        for E in self.experts_by_depth or (self.num_experts,):
            if E < self.num_experts_per_tok:
                where = join(path, "experts_by_depth" if self.experts_by_depth else "num_experts")
                raise ConfigError(f"{where}: {E} experts, num_experts_per_tok={self.num_experts_per_tok} of them")

    def experts(self, name: str, num_layers: int) -> int:
        parts = self.experts_by_depth
        return parts[layer_of(name) * len(parts) // num_layers] if parts else self.num_experts


class Mola(Routed):
    """MoLA: top-K LoRA experts, a number of experts for each part of the depth."""

    Config = MolaConfig

    def chosen(self, probs_TE, ctx):
        return top_k_gates(probs_TE, self.config.num_experts_per_tok, renormalise=True)

    def most_gates(self):
        return self.config.num_experts_per_tok

    def losses(self, probs_TE, gates_TE, ctx):
        if not self.config.router_aux_loss_coef:
            return {}
        return {"balance": self.config.router_aux_loss_coef * balance(probs_TE, gates_TE, self.live(), ctx)}
