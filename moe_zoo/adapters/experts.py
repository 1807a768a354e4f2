"""LoRA beside the experts of a routed layer: one for each expert, chosen by the layer's own router.

    expert e's W_e x becomes W_e x + s (x A_e) B_e

Rows are sorted by expert already, so both products are grouped matmuls of the bank's own kind. E experts of the base,
D and N an expert's input and output, R ranks.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe_zoo.adapters.targets import AdapterConfig, Linear
from moe_zoo.core.param import ByLayer, Constant, Frozen, Uniform, param


class ExpertLora(nnx.Module):
    """A LoRA for each of the base's experts, beside one of their linear layers."""

    #: beside each expert
    num_experts = 1

    def __init__(self, config: AdapterConfig, linear: Linear):
        scales = config.scales(linear)[:, 0]
        E, R, D, N = linear.bank, scales.shape[-1], linear.in_features, linear.out_features
        self.config, self.linear, self.dims = config, linear, (E, R, D, N)
        self.a = param((E, R, D), ("expert", None, linear.axes[0]), Uniform(1 / math.sqrt(D)))
        self.b = param((E, R, N), ("expert", None, linear.axes[1]), Constant(0.0))
        self.scale = param((R,), (None,), ByLayer(linear.layers, scales), kind=Frozen)

    def __call__(self, x: Float[Array, "*rows D"], multiply: Callable) -> Float[Array, "*rows N"]:
        """What is added; `multiply(x, w [E, in, out])` gives every row its expert's product."""
        a_EDR, b_ERN = jnp.swapaxes(self.a[...], 1, 2).astype(x.dtype), self.b[...].astype(x.dtype)
        return multiply(multiply(x, a_EDR) * self.scale[...].astype(x.dtype), b_ERN)

    def merged(self, w_EDN: Float[Array, "E D N"], weights=None) -> Float[Array, "E D N"]:
        """The weights of plain experts that do the same."""
        return w_EDN + self.delta()

    def unmerged(self, w_EDN: Float[Array, "E D N"], weights=None) -> Float[Array, "E D N"]:
        """The weights that `merged` was given."""
        return w_EDN - self.delta()

    def delta(self) -> Float[Array, "E D N"]:
        """What is added to the weights."""
        return jnp.einsum("erd,r,ern->edn", self.a[...], self.scale[...], self.b[...])

    def idle_parameters(self) -> int:
        """How many trained numbers never move: ranks that a layer does not have."""
        E, _, D, N = self.dims
        return int((self.config.scales(self.linear) == 0).sum()) * E * (D + N)

    def flops_per_row(self) -> int:
        """Forward; multiply-adds count two."""
        _, R, D, N = self.dims
        return 2 * R * (D + N)
