"""The feed-forward formula, and the dense network that every token visits."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from moe_zoo.core.param import Constant, fan_in, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join
from moe_zoo.layers.tap import Tap, untouched
from pallas_kernels.expert_ffn.activations import hidden

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"]


@dataclasses.dataclass(frozen=True)
class FeedForwardConfig:
    """`gated`: act(x W_gate) * (x W_up) W_down (arXiv 2002.05202); otherwise act(x W_up) W_down. `bias`: one behind
    every matrix. gpt-oss: `clamp` c limits the gate to c and the up part to [-c, c], `up_shift` is added to the latter.
    `linear_factor`: a third matrix, act(x W_gate) * (x W_up) * (x W_linear) W_down (OpenMoE).
    """

    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False
    clamp: float | None = None
    up_shift: float = 0.0
    linear_factor: bool = dataclasses.field(default=False, metadata={"silent": True})

    def validate(self, path: str) -> None:
        if self.linear_factor and (self.bias or not self.gated):
            raise ConfigError(f"{join(path, 'linear_factor')}: needs gated=true and bias=false")

    @property
    def plain(self) -> bool:
        """Whether it is the formula of the fused kernels."""
        return not self.bias and self.clamp is None and self.up_shift == 0.0 and not self.linear_factor

    def hidden(self, gate, up, linear=None):
        """The hidden layer from its pre-activations."""
        if self.clamp is not None:
            gate = None if gate is None else jnp.minimum(gate, self.clamp)
            up = jnp.clip(up, -self.clamp, self.clamp)
        up = up + self.up_shift if self.up_shift else up
        return hidden(self.activation, gate, up if linear is None else up * linear)

    def flops(self, D: int, F: int) -> int:
        """Forward FLOPs of one token through one network of width F; multiply-adds count two."""
        return 2 * D * F * (2 + self.gated + self.linear_factor)


def ffn(x, w_gate, w_up, w_down, activation: str):
    """The formula, over any leading axes that matmul broadcasts. `w_gate` None: no gate."""
    gate = None if w_gate is None else x @ w_gate
    return hidden(activation, gate, x @ w_up) @ w_down


class MLP(nnx.Module):
    """SwiGLU by default."""

    #: its linear layers that adapters may act beside -> how many dims of the weight are inputs
    linears = {"w_gate": 1, "w_up": 1, "w_down": 1}

    def __init__(self, config: FeedForwardConfig, *, hidden_size: int, intermediate_size: int, out_scale: float):
        D, F = hidden_size, intermediate_size
        self.config, self.dims = config, (D, F)
        if config.gated:
            self.w_gate = param((D, F), ("embed", "mlp"), fan_in(D))
        self.w_up = param((D, F), ("embed", "mlp"), fan_in(D))
        self.w_down = param((F, D), ("mlp", "embed"), fan_in(F, out_scale))
        if config.linear_factor:
            self.w_linear = param((D, F), ("embed", "mlp"), fan_in(D))
        if config.bias:
            if config.gated:
                self.b_gate = param((F,), ("mlp",), Constant(0.0))
            self.b_up = param((F,), ("mlp",), Constant(0.0))
            self.b_down = param((D,), ("embed",), Constant(0.0))

    def __call__(self, x, tap: Tap | None = None):
        """`tap`: what is made of every linear layer's output."""
        if tap is not None or not self.config.plain:
            return self._general(x, tap or untouched)
        gate = self.w_gate[...].astype(x.dtype) if self.config.gated else None
        return ffn(x, gate, self.w_up[...].astype(x.dtype), self.w_down[...].astype(x.dtype), self.config.activation)

    def _general(self, x, tap: Tap):
        return self.last(self.config.hidden(*self.first(x, tap)), tap)

    def first(self, x, tap: Tap = untouched):
        """(gate, up), with a third factor (gate, up, linear): the hidden layer's pre-activations; no gate is None."""
        gate, up = self._affine(x, "gate", tap) if self.config.gated else None, self._affine(x, "up", tap)
        return (gate, up, x @ self.w_linear[...].astype(x.dtype)) if self.config.linear_factor else (gate, up)

    def last(self, hidden, tap: Tap = untouched):
        """The output from the hidden layer."""
        return self._affine(hidden, "down", tap)

    def _affine(self, x, name: str, tap: Tap):
        w = getattr(self, f"w_{name}")[...].astype(x.dtype)
        y = tap(f"w_{name}", x, x @ w, w)
        return y + getattr(self, f"b_{name}")[...].astype(x.dtype) if self.config.bias else y

    def flops_per_token(self) -> int:
        return self.config.flops(*self.dims)
