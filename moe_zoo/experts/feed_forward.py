"""A bank of feed-forward experts: gated (SwiGLU, GEGLU) or plain, on the fused expert kernel."""

from flax import nnx
from jaxtyping import Array, Float

import pallas_kernels as ops
from moe_zoo.core.param import fan_in, param
from moe_zoo.layers.mlp import FeedForwardConfig, ffn


class FeedForward(nnx.Module):
    """E feed-forward networks of width F: SwiGLU by default, GELU or ReLU with or without a gate."""

    Config = FeedForwardConfig

    def __init__(
        self, config: FeedForwardConfig, *, num_experts: int, hidden_size: int, intermediate_size: int, out_scale: float
    ):
        E, D, F = num_experts, hidden_size, intermediate_size
        self.config, self.dims = config, (E, D, F)
        if config.gated:
            self.w_gate = param((E, D, F), ("expert", "embed", "expert_mlp"), fan_in(D))
        self.w_up = param((E, D, F), ("expert", "embed", "expert_mlp"), fan_in(D))
        self.w_down = param((E, F, D), ("expert", "expert_mlp", "embed"), fan_in(F, out_scale))

    def weights(self, dtype) -> tuple:
        """(gate or None, up, down) in the compute dtype."""
        gate = self.w_gate[...].astype(dtype) if self.config.gated else None
        return gate, self.w_up[...].astype(dtype), self.w_down[...].astype(dtype)

    def routed(self, x_TD: Float[Array, "T D"], plan) -> Float[Array, "T D"]:
        """Sums each token's experts by a ragged RowPlan; tokens without a row come out zero."""
        return ops.routed_ffn(
            x_TD,
            *self.weights(x_TD.dtype),
            plan.group_sizes,
            plan.choice,
            plan.slot,
            plan.gates,
            gate_on=plan.gate_on,
            activation=self.config.activation,
        )

    def batched(self, x_ECD: Float[Array, "E C D"]) -> Float[Array, "E C D"]:
        """The same number of rows for every expert."""
        return ffn(x_ECD, *self.weights(x_ECD.dtype), self.config.activation)

    def flops_per_row(self) -> int:
        """Forward; multiply-adds count two."""
        return self.config.flops(*self.dims[1:])
