"""A bank of feed-forward experts: gated (SwiGLU, GEGLU) or plain, on the fused expert kernel."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

import pallas_kernels as ops
from moe_zoo.core.param import Constant, Frozen, fan_in, param
from moe_zoo.layers.mlp import FeedForwardConfig, ffn

_MATRICES = ("w_gate", "w_up", "w_down")
_LINEAR = "w_linear"  # the third factor, if there is one


class FeedForward(nnx.Module):
    """E feed-forward networks of width F: SwiGLU by default, GELU or ReLU with or without a gate."""

    Config = FeedForwardConfig
    #: its linear layers -> how many dims of one expert's weight are inputs
    linears = {"w_gate": 1, "w_up": 1, "w_down": 1}
    #: variables that are added to a sum over the hidden width, which may be split over devices
    after_sum = ("b_down",)

    def __init__(
        self, config: FeedForwardConfig, *, num_experts: int, hidden_size: int, intermediate_size: int, out_scale: float
    ):
        E, D, F = num_experts, hidden_size, intermediate_size
        self.config, self.dims = config, (E, D, F)
        if config.gated:
            self.w_gate = param((E, D, F), ("expert", "embed", "expert_mlp"), fan_in(D))
        self.w_up = param((E, D, F), ("expert", "embed", "expert_mlp"), fan_in(D))
        self.w_down = param((E, F, D), ("expert", "expert_mlp", "embed"), fan_in(F, out_scale))
        if config.linear_factor:
            self.w_linear = param((E, D, F), ("expert", "embed", "expert_mlp"), fan_in(D))
        if config.bias:
            if config.gated:
                self.b_gate = param((E, F), ("expert", "expert_mlp"), Constant(0.0))
            self.b_up = param((E, F), ("expert", "expert_mlp"), Constant(0.0))
            self.b_down = param((E, D), ("expert", "embed"), Constant(0.0))

    def quantize(self) -> None:
        """Declares the matrices as int8 with a scale per output channel (`w_up_scale` and so on), all frozen.

        For a bank without values yet, stacked or not: whoever loads gives them.
        """
        for name in [name for name in (*_MATRICES, _LINEAR) if hasattr(self, name)]:
            var = getattr(self, name)
            shape, axes, more = var.get_value().shape, var.logical_axes, var.get_metadata()
            layers = more.get("layer_names")
            for suffix, size, axis, dtype in (("", shape[-2], axes[-2], jnp.int8), ("_scale", 1, None, jnp.float32)):
                new = (*shape[:-2], size, shape[-1]), (*axes[:-2], axis, axes[-1])
                declared = param(*new, Constant(1.0), dtype=dtype, kind=Frozen)
                if layers:
                    declared = declared.replace(layer_names=tuple(f"{layer}{suffix}" for layer in layers))
                setattr(self, f"{name}{suffix}", declared)

    @property
    def quantized(self) -> bool:
        """Whether the matrices are int8."""
        return hasattr(self, "w_up_scale")

    def weights(self, dtype) -> tuple:
        """(gate or None, up, down), then linear if there is one: arrays in the compute dtype, or `Quantized`."""
        found = tuple(self._matrix(name, dtype) if hasattr(self, name) else None for name in _MATRICES)
        return (*found, self._matrix(_LINEAR, dtype)) if self.config.linear_factor else found

    def _matrix(self, name: str, dtype):
        values = getattr(self, name)[...]
        return ops.Quantized(values, getattr(self, f"{name}_scale")[...]) if self.quantized else values.astype(dtype)

    def _wide(self, dtype) -> tuple:
        """`weights` as arrays, for what has no grouped matmul."""
        return tuple(w.dequantized(dtype) if isinstance(w, ops.Quantized) else w for w in self.weights(dtype))

    def routed(self, x_TD: Float[Array, "T D"], plan) -> Float[Array, "T D"]:
        """Sums each token's experts by a ragged RowPlan; tokens without a row come out zero."""
        if not self._fused:
            return plan.combine(self._general_rows(plan.gather(x_TD), plan.group_sizes))
        return plan.ffn(x_TD, *self.weights(x_TD.dtype), activation=self.config.activation)

    def batched(self, x_ECD: Float[Array, "E C D"]) -> Float[Array, "E C D"]:
        """The same number of rows for every expert."""
        if not self._fused:
            return self._general(x_ECD, self._wide(x_ECD.dtype), lambda x, w: x @ w, lambda b_EX: b_EX[:, None])
        return ffn(x_ECD, *self._wide(x_ECD.dtype), self.config.activation)

    def _general_rows(self, x_RD, group_sizes_E):
        end_E = jnp.cumsum(group_sizes_E)
        expert_R = jnp.searchsorted(end_E, jnp.arange(x_RD.shape[0]), side="right")
        y_RD = self._general(
            x_RD,
            self.weights(x_RD.dtype),
            lambda x, w: ops.grouped_matmul(x, w, group_sizes_E),
            lambda b_EX: jnp.take(b_EX, expert_R, axis=0, mode="clip"),
        )
        return jnp.where(jnp.arange(x_RD.shape[0])[:, None] < end_E[-1], y_RD, 0)

    @property
    def _fused(self) -> bool:
        """Whether it is the formula of the fused kernels: `plain`, and no adapters (`adapters.experts`)."""
        return self.config.plain and not hasattr(self, "adapters")

    def _general(self, x, weights, multiply, spread):
        """The formula with biases, limits, a third factor and adapters; `spread` lays one vector per expert along the
        rows of x.
        """
        gate, up, down, *linear = weights
        adapters = getattr(self, "adapters", {})

        def affine(x, w, name):
            y = multiply(x, w)
            if f"w_{name}" in adapters:
                y = y + adapters[f"w_{name}"](x, multiply)
            return y + spread(getattr(self, f"b_{name}")[...].astype(x.dtype)) if self.config.bias else y

        gate = affine(x, gate, "gate") if self.config.gated else None
        hidden = self.config.hidden(gate, affine(x, up, "up"), *(multiply(x, w) for w in linear))
        return affine(hidden, down, "down")

    def flops_per_row(self) -> int:
        """Forward; multiply-adds count two."""
        adapters = sum(adapter.flops_per_row() for adapter in getattr(self, "adapters", {}).values())
        return self.config.flops(*self.dims[1:]) + adapters
