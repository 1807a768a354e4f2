"""What the GPU kernels of the expert network make of their sums before they store them (`_gpu_rows.Epilogue`)."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.expert_ffn import activations

Load = Callable[[], Array]


def erf(z: Array) -> Array:
    """The error function to 5e-7, of what every compiler of GPU kernels knows: `jax.lax.erf` none of them does.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
    """
    t = 1 / (1 + 0.3275911 * jnp.abs(z))
    powers = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    positive = 1 - powers * jnp.exp(-z * z)
    return jnp.where(z < 0, -positive, positive)


_ACTIVATIONS = activations.ACTIVATIONS | {"gelu": functools.partial(activations.gelu, erf=erf)}


@dataclasses.dataclass(frozen=True)
class Hidden:
    """Pre-activations -> hidden layer, and the pre-activations themselves if they are to be saved."""

    activation: str
    save: bool

    def __call__(self, pre: list[Array], loads: list[Load], scale: Array | None) -> list[Array]:
        hidden = _ACTIVATIONS[self.activation](pre[0])[0]
        hidden = hidden * pre[1] if len(pre) > 1 else hidden
        return [hidden, *pre] if self.save else [hidden]


@dataclasses.dataclass(frozen=True)
class HiddenAndGradients:
    """The hidden layer's gradient and the saved pre-activations -> hidden layer, gradients of the pre-activations.

    Then, with a scale, the dot of the hidden layer and its gradient, of each row.
    """

    activation: str

    def __call__(self, dhidden: list[Array], loads: list[Load], scale: Array | None) -> Iterator[Array]:
        # one after the other, each side loaded where it is needed: all at once don't fit into registers
        load = lambda i: loads[i]().astype(jnp.float32)
        value, slope = _ACTIVATIONS[self.activation](load(0))
        dhidden_RF = dhidden[0] if scale is None else dhidden[0] * scale
        up_RF = load(1) if len(loads) > 1 else None
        hidden_RF = value if up_RF is None else value * up_RF
        dot_R = None if scale is None else jnp.sum(hidden_RF * dhidden[0], axis=1)
        yield hidden_RF if scale is None else hidden_RF * scale
        yield dhidden_RF * slope if up_RF is None else dhidden_RF * up_RF * slope
        if up_RF is not None:
            yield dhidden_RF * value
        if dot_R is not None:
            yield dot_R
